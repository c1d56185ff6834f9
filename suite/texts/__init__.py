"""Texts: where they are found, their tokens and parts, what counting achieves, and writing with a model."""

from .chains import Chains
from .corpus import Corpus, load_corpus
from .drawn import Drawn
from .figures import draw_splits, headline, stored_floors
from .known_depth import Hops
from .models import load_model, save_model
from .ngrams import context_numbers, ngram_floor, ngram_surprisal
from .sources import CORPORA, read_text
from .tokenizers import TOKENIZERS, CharTokenizer, SubwordTokenizer, Tokenizer
from .writing import write

__all__ = [
    "CORPORA",
    "TOKENIZERS",
    "Chains",
    "CharTokenizer",
    "Corpus",
    "Drawn",
    "Hops",
    "SubwordTokenizer",
    "Tokenizer",
    "context_numbers",
    "draw_splits",
    "headline",
    "load_corpus",
    "load_model",
    "ngram_floor",
    "ngram_surprisal",
    "read_text",
    "save_model",
    "stored_floors",
    "write",
]
