"""A text coloured by depth beside the same coloured by surprisal: for a notebook, and as an offline page."""

from __future__ import annotations

import base64
import io
import json
import unicodedata
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

import morlib

from ..results.figures import bangla_font
from .bangla import HASANTA, surfaces

BLACK, WHITE = "#000000", "#ffffff"
# (background, ink) from least to most, the ink whichever of black and white is read better on it
SHADES = {
    "depth": {
        "light": [
            ("#ffffff", BLACK), ("#d6e2ee", BLACK), ("#adc5de", BLACK), ("#84a8ce", BLACK),
            ("#5a8bbd", BLACK), ("#316eac", WHITE), ("#08519c", WHITE),
        ],
        "dark": [
            ("#161b22", WHITE), ("#263647", WHITE), ("#37526c", WHITE), ("#486e90", WHITE),
            ("#5889b5", BLACK), ("#68a4da", BLACK), ("#79c0ff", BLACK),
        ],
    },
    "surprisal": {
        "light": [
            ("#ffffff", BLACK), ("#f5e0d5", BLACK), ("#ebc1aa", BLACK), ("#e2a280", BLACK),
            ("#d88456", BLACK), ("#ce652b", BLACK), ("#c44601", WHITE),
        ],
        "dark": [
            ("#161b22", WHITE), ("#3d322b", WHITE), ("#644934", WHITE), ("#8a603c", WHITE),
            ("#b17845", BLACK), ("#d88f4e", BLACK), ("#ffa657", BLACK),
        ],
    },
}  # fmt: skip
MOST = 6  # the darkest shade
LEGENDS = {  # title, unit, and how a value is written
    "depth": ("Depth: what the router spent on predicting each token", "applications of a layer", "{:.0f}"),
    "surprisal": ("Surprisal: how hard each token was to predict", "nats", "{:.1f}"),
}
KEPT = ("tokens", "depth", "surprisal", "probability", "runs", "recursions")  # what the page's script reads


# ---- What is shown ----


def section(title: str, note: str, lang: str, model, reference, tokenizer, text: str) -> dict:
    """What a page shows of a text: its tokens, and from the second on what was spent on predicting each
    (depth, runs [tokens - 1][N]), MoR's probability of it, and its surprisal for the reference model
    (nats).

    The text is read window by window, so the first tokens of a window are predicted from little.
    Raises ValueError for a text of fewer than two tokens.
    """
    ids = torch.tensor(tokenizer.encode(text))
    if len(ids) < 2:
        raise ValueError("a text needs two tokens or more to be shown: the first is only read")
    parts, length = [], model.cfg.max_len
    for start in range(0, len(ids) - 1, length):
        window = ids[None, start : start + length + 1]
        hard = morlib.score(reference, window)["surprisal"]
        parts.append(morlib.score(model, window) | dict(difficulty=hard))
    score = {key: torch.cat([part[key][..., 0, :] for part in parts], dim=-1) for key in parts[0]}
    return dict(
        title=title,
        note=note,
        lang=lang,
        recursions=model.cfg.max_recursions,
        tokens=surfaces(tokenizer, ids),
        depth=score["depth"].tolist(),
        surprisal=score["difficulty"].tolist(),
        probability=(-score["surprisal"]).exp().tolist(),
        runs=(score["actions"] >= morlib.FORWARD).sum(1).T.tolist(),
    )


def levels(values: list[float]) -> tuple[list[int], float, float]:
    """The shade 0 .. MOST of each value, and the values at both ends. The highest 2 % share the last
    shade."""
    low, high = min(values), sorted(values)[int(0.98 * (len(values) - 1))]
    span = max(high - low, 1e-9)
    return [min(MOST, round(MOST * max(value - low, 0) / span)) for value in values], low, high


def signs(tokens: list[str]) -> list[list[int]]:
    """The tokens from the second on, by number; those that are drawn as one sign are together.

    A piece may begin with a vowel sign, or follow one that ends with a hasanta or a joiner.
    """
    groups = []
    for i, token in enumerate(tokens[1:], 1):
        is_mark = unicodedata.category(token[0])[0] == "M"
        if i > 1 and (is_mark or tokens[i - 1][-1] in (HASANTA, "\u200d")):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def painted(part: dict, what: str) -> tuple[list[dict], float, float]:
    """The signs of a section in order, each with its first token, number of tokens, shade and text; and the
    values at both ends of the shades. A sign of several tokens has their mean shade."""
    level, low, high = levels(part[what])
    spans = []
    for group in signs(part["tokens"]):
        shade = round(sum(level[i - 1] for i in group) / len(group))
        text = visible("".join(part["tokens"][i] for i in group))
        spans.append(dict(first=group[0], count=len(group), shade=shade, text=text))
    return spans, low, high


def visible(text: str) -> str:
    """A text in which a line's end is seen, and coloured."""
    return text.replace("\n", "\u21b5\n")


def panels(part: dict) -> list[dict]:
    """Both coloured texts of a section, as the templates draw them."""
    result = []
    for what, (title, unit, form) in LEGENDS.items():
        spans, low, high = painted(part, what)
        ends = dict(low=form.format(low), high=form.format(high))
        head = visible(part["tokens"][0])
        result.append(dict(what=what, title=title, unit=unit, head=head, spans=spans) | ends)
    return result


# ---- As HTML ----


def templates() -> Environment:
    """The templates beside this file. What they are given is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def fragment(part: dict) -> str:
    """Both coloured texts of a section for a notebook's output, with all colours inline, so that any theme
    shows it."""
    paint = {what: shades["light"] for what, shades in SHADES.items()}
    both = [panel | dict(spans=merged(panel["spans"])) for panel in panels(part)]
    template = templates().get_template("fragment.html")
    return template.render(part=part, panels=both, paint=paint, face=Markup(face([part])))


def merged(spans: list[dict]) -> list[dict]:
    """Neighbours of one shade as one span."""
    result = []
    for span in spans:
        if result and result[-1]["shade"] == span["shade"]:
            result[-1] = result[-1] | dict(text=result[-1]["text"] + span["text"])
        else:
            result.append(span)
    return result


def page(parts: list[dict]) -> str:
    """One HTML page that asks for nothing from outside. Under the pointer or the arrow keys, a token
    tells its probability, depth, and what each layer did."""
    sections = [part | dict(panels=panels(part)) for part in parts]
    template = templates().get_template("textpage.html")
    return template.render(
        title="Where a router spends its depth",
        sections=sections,
        shades=SHADES,
        most=MOST,
        face=Markup(face(parts)),
        data=data_of(parts),
    )


def data_of(parts: list[dict]) -> Markup:
    """What the page's script reads of the sections, as JSON that cannot end its element."""
    kept = [{key: part[key] for key in KEPT} for part in parts]
    rounded = json.loads(json.dumps(kept), parse_float=lambda value: round(float(value), 4))
    return Markup(json.dumps(rounded, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def face(parts: list[dict]) -> str:
    """A @font-face rule with what Bangla sections need of the font that ships, since few machines can be
    trusted to have one; empty without a Bangla section."""
    from fontTools import subset  # comes with matplotlib

    needed = {c for part in parts if part["lang"] == "bn" for token in part["tokens"] for c in token}
    path = bangla_font()
    if not needed or not path:
        return ""
    options = subset.Options(layout_features=["*"], notdef_outline=True)
    options.drop_tables += ["meta"]
    font, subsetter = subset.load_font(str(path), options), subset.Subsetter(options)
    halves = set(unicodedata.normalize("NFD", "".join(needed)))  # shaping takes a two-part vowel sign apart
    subsetter.populate(unicodes={*map(ord, needed | halves), 0x25CC, 0x200C, 0x200D})
    subsetter.subset(font)
    packed = io.BytesIO()
    font.save(packed)
    data = base64.b64encode(packed.getvalue()).decode()
    return f'@font-face{{font-family:"Bangla of this page";src:url(data:font/ttf;base64,{data})}}'
