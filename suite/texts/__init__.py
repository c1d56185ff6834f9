"""Texts: where they are found, their tokens and parts, what counting achieves, and writing with a model."""

from .chains import Chains
from .corpus import Corpus, load_corpus
from .drawn import Drawn
from .figures import draw_splits, headline, stored_floors
from .known_depth import Hops
from .models import load_model, save_model
from .ngrams import context_numbers, ngram_floor, ngram_surprisal
from .tokenizers import TOKENIZERS, CharTokenizer, SubwordTokenizer, Tokenizer
from .writing import write
