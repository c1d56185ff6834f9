"""A text coloured by depth beside the same text coloured by surprisal: as a fragment for a notebook and as one offline page."""

from __future__ import annotations

import base64
import html
import io
import json
import unicodedata

import torch

import analysis
import morlib

STEPS = 7  # shades
HUES = {"depth": ("#ffffff", "#08519c", "#161b22", "#79c0ff"), "surprisal": ("#ffffff", "#c44601", "#161b22", "#ffa657")}  # light from, to; dark from, to


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), (v / 255 for v in _rgb(colour))))


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def shades(what: str, dark: bool = False) -> list[tuple[str, str]]:
    """(background, ink) from least to most; the ink is whichever of black and white is read better on it."""
    start, end = (_rgb(c) for c in HUES[what][2 * dark : 2 * dark + 2])
    made = ["#" + "".join(f"{round(a + (b - a) * step / (STEPS - 1)):02x}" for a, b in zip(start, end)) for step in range(STEPS)]
    return [(colour, max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))) for colour in made]


def section(title: str, note: str, lang: str, model, meter, tokenizer, text: str) -> dict:
    """What a page shows of a text: its tokens, and from the second on what was spent on predicting each and how hard that was.

    The text is read window by window, so the first tokens of a window are predicted from little.
    """
    ids = torch.tensor(tokenizer.encode(text))
    if len(ids) < 2:
        raise ValueError("a text needs two tokens or more to be shown: the first is only read")
    seen, length = [], model.cfg.max_len
    for start in range(0, len(ids) - 1, length):
        window = ids[None, start : start + length + 1]
        seen.append(morlib.score(model, window) | {"difficulty": morlib.score(meter, window)["surprisal"]})
    joined = {key: torch.cat([part[key] for part in seen], dim=-1)[..., 0, :] for key in ("surprisal", "depth", "actions", "difficulty")}
    return dict(title=title, note=note, lang=lang, tokens=analysis.surfaces(tokenizer, ids), depth=joined["depth"].tolist(), recursions=model.cfg.max_recursions,
                surprisal=joined["difficulty"].tolist(), probability=(-joined["surprisal"]).exp().tolist(),
                runs=(joined["actions"] >= morlib.FORWARD).sum(1).T.tolist())  # runs [tokens - 1][N]  # fmt: skip


def steps(values: list[float]) -> tuple[list[int], float, float]:
    """The shade 0 .. STEPS - 1 of each value, and the values at both ends; the highest 2 % share the last shade."""
    low, high = min(values), sorted(values)[int(0.98 * (len(values) - 1))]
    return [min(STEPS - 1, round((STEPS - 1) * max(v - low, 0) / max(high - low, 1e-9))) for v in values], low, high


def together(tokens: list[str]) -> list[list[int]]:
    """The tokens from the second on, those that are written as one sign in one group: a piece may begin with a vowel sign or follow a hasanta."""
    groups = []
    for i, token in enumerate(tokens[1:], 1):
        joins = i > 1 and (unicodedata.category(token[0])[0] == "M" or tokens[i - 1][-1] in "\u09cd\u200d")
        groups[-1].append(i) if joins else groups.append([i])
    return groups


def painted(part: dict, what: str) -> tuple[list[tuple[int, int, int, str]], float, float]:
    """(first token, tokens, shade, text) of each group of a section, and the values at both ends of the shades; a group has its tokens' mean shade."""
    level, low, high = steps(part[what])
    spans = [(g[0], len(g), round(sum(level[i - 1] for i in g) / len(g)), "".join(part["tokens"][i] for i in g)) for g in together(part["tokens"])]
    return spans, low, high


def shown(token: str) -> str:
    return html.escape(token).replace("\n", "\u21b5\n")


LEGENDS = {"depth": ("Depth: what was spent on predicting each token (applications)", "{:.0f}"),
           "surprisal": ("Surprisal: how hard each token was to predict (nats)", "{:.1f}")}  # fmt: skip


def face(parts: list[dict]) -> str:
    """A @font-face rule that carries what Bangla sections need of the font that ships, or nothing: few machines can be trusted to have one."""
    from fontTools import subset  # comes with matplotlib

    needed, path = {c for part in parts if part["lang"] == "bn" for token in part["tokens"] for c in token}, morlib.bangla_font()
    if not needed or not path:
        return ""
    options = subset.Options(layout_features=["*"], notdef_outline=True)
    options.drop_tables += ["meta"]
    font, kept = subset.load_font(str(path), options), subset.Subsetter(options)
    parts_of = set(unicodedata.normalize("NFD", "".join(needed)))  # shaping takes a two-part vowel sign apart
    kept.populate(unicodes={*map(ord, needed | parts_of), 0x25CC, 0x200C, 0x200D})
    kept.subset(font)
    font.save(packed := io.BytesIO())
    return f'@font-face{{font-family:"Bangla of this page";src:url(data:font/ttf;base64,{base64.b64encode(packed.getvalue()).decode()})}}'


def fragment(part: dict) -> str:
    """Both coloured texts of a section for a notebook's output, with all colours inline, so that any theme shows it."""
    made = []
    written = "font-family:'Bangla of this page',sans-serif;font-size:1.15em;" if part["lang"] == "bn" else ""
    for what, (legend, form) in LEGENDS.items():
        groups, low, high = painted(part, what)
        paint = [f"background:{back};color:{ink}" for back, ink in shades(what)]
        spans = "".join(f'<span style="{paint[k]}">{shown(text)}</span>' for _, _, k, text in groups)
        key = "".join(f'<span style="{p}">&nbsp;&nbsp;&nbsp;</span>' for p in paint)
        made.append(f'<div style="flex:1 1 22em;min-width:0;background:#fff;color:#000;padding:.6em"><b>{legend}</b><br>{form.format(low)} {key} {form.format(high)}'
                    f'<pre lang="{part["lang"]}" style="{written}white-space:pre-wrap;background:#fff;color:#000;line-height:1.6">{shown(part["tokens"][0])}{spans}</pre></div>')  # fmt: skip
    return f'<style>{face([part])}</style><div style="display:flex;flex-wrap:wrap;gap:1em;border:1px solid #888">{"".join(made)}</div>'


STYLE = """
:root{color-scheme:light;--page:#ffffff;--ink:#1a1a1a;--soft:#57606a;--line:#8c959f;--bar:#f6f8fa;--focus:#d4007a;LIGHT}
@media (prefers-color-scheme:dark){:root:not([data-theme=light]){DARKVARS}}
:root[data-theme=dark]{DARKVARS}
FACE*{box-sizing:border-box}
body{margin:0;padding:0 0 12rem;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans","Bangla of this page",sans-serif}
header,main{max-width:84rem;margin:auto;padding:1rem 1.25rem}
header{display:flex;gap:1rem;align-items:flex-start;justify-content:space-between}
h1{font-size:1.6rem;margin:0 0 .4rem}h2{font-size:1.2rem;margin:1.4rem 0 .2rem}h3{font-size:.95rem;font-weight:600;margin:0 0 .35rem}
p{margin:.2rem 0;max-width:75ch}.soft{color:var(--soft)}
button{font:inherit;color:var(--ink);background:var(--bar);border:1px solid var(--line);border-radius:.4rem;padding:.35rem .8rem;cursor:pointer;white-space:nowrap}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1.5rem;margin-top:.8rem}
@media (max-width:56rem){.pair{grid-template-columns:1fr}}
.key{display:flex;align-items:center;gap:.5rem;font-size:.85rem;color:var(--soft)}.key i{display:inline-block;width:1.5rem;height:.9rem}
.key span{display:inline-flex;border:1px solid var(--line)}
pre{font:1rem/1.75 ui-monospace,"DejaVu Sans Mono","Bangla of this page",monospace;white-space:pre-wrap;overflow-wrap:anywhere;margin:.5rem 0;padding:.75rem;border:1px solid var(--line);border-radius:.4rem}
pre:lang(bn){font-family:"Bangla of this page",sans-serif;font-size:1.15rem}
pre span{cursor:default}pre span.on{outline:2px solid var(--focus);outline-offset:1px;position:relative}
#bar{position:fixed;left:0;right:0;bottom:0;min-height:7.5rem;background:var(--bar);border-top:1px solid var(--line);padding:.7rem 1.25rem;max-height:45vh;overflow:auto}
#bar>div{max-width:81.5rem;margin:auto}#bar dl{display:flex;flex-wrap:wrap;gap:.2rem 1.6rem;margin:0 0 .4rem}#bar .runs+dl{margin-top:.7rem}
#bar dl div{display:flex;gap:.45rem}#bar dt{color:var(--soft)}#bar dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums;white-space:pre}
.runs{display:flex;gap:.3rem;flex-wrap:wrap}.runs b{font-size:.8rem;font-weight:500;border:1px solid var(--line);border-radius:.25rem;padding:.1rem .4rem;text-align:center;min-width:4.6rem}
SHADES"""

SCRIPT = """
const data=JSON.parse(document.getElementById('data').textContent),bar=document.getElementById('bar'),root=document.documentElement;
const word=n=>n===0?'skip':n===1?'forward':'recurse \\u00d7'+n;
const visible=t=>t==='\\n'?'\\u21b5 (newline)':t===' '?'\\u2423 (space)':t.replace(/ /g,'\\u2423');
function show(span){
 const part=data[span.closest('section').dataset.part],first=+span.dataset.i,box=document.createElement('div');
 document.querySelectorAll('.on').forEach(e=>e.classList.remove('on'));
 span.closest('section').querySelectorAll('[data-i="'+first+'"]').forEach(e=>e.classList.add('on'));
 for(let i=first;i<first+ +span.dataset.n;i++){
  const at=i-1,list=document.createElement('dl'),runs=document.createElement('div');runs.className='runs';
  for(const [name,value] of [['token',visible(part.tokens[i])],['read before it',visible(part.tokens[at])],['probability (MoR)',(100*part.probability[at]).toFixed(1)+' %'],
   ['depth',part.depth[at]+' applications'],['surprisal (fixed-depth model)',part.surprisal[at].toFixed(2)+' nats']]){
   const d=document.createElement('div'),t=document.createElement('dt'),v=document.createElement('dd');t.textContent=name;v.textContent=value;d.append(t,v);list.append(d)}
  part.runs[at].forEach((n,layer)=>{const b=document.createElement('b');b.textContent=(layer+1)+' '+word(n);b.className='d'+Math.round(n*SHADE/part.recursions);runs.append(b)});
  box.append(list,runs)}
 bar.replaceChildren(box);
}
document.addEventListener('mouseover',e=>{const s=e.target.closest('pre span[data-i]');if(s)show(s)});
document.addEventListener('focusin',e=>{const s=e.target.closest('pre span[data-i]');if(s)show(s)});
document.addEventListener('keydown',e=>{
 const s=e.target.closest('pre span[data-i]');if(!s)return;
 const all=[...s.parentElement.querySelectorAll('[data-i]')],k=all.indexOf(s);
 const to={ArrowRight:k+1,ArrowLeft:k-1,ArrowDown:k+20,ArrowUp:k-20,Home:0,End:all.length-1}[e.key];
 if(to===undefined)return;
 e.preventDefault();const next=all[Math.min(Math.max(to,0),all.length-1)];s.tabIndex=-1;next.tabIndex=0;next.focus();show(next);
});
document.getElementById('theme').addEventListener('click',()=>{
 const dark=root.dataset.theme?root.dataset.theme==='dark':matchMedia('(prefers-color-scheme: dark)').matches;root.dataset.theme=dark?'light':'dark'});
"""


def page(parts: list[dict], title: str = "Depth by token") -> str:
    """One HTML page without anything from outside: hover, or move with the arrow keys, to see a token's probability, depth and actions."""

    def variables(dark):
        return "".join(f"--{what[0]}{k}:{back};--{what[0]}{k}i:{ink};" for what in LEGENDS for k, (back, ink) in enumerate(shades(what, dark)))

    dark = "color-scheme:dark;--page:#0d1117;--ink:#e6edf3;--soft:#9da7b3;--line:#6e7681;--bar:#161b22;--focus:#ff7bc0;" + variables(True)
    rules = "".join(f".{w[0]}{k}{{background:var(--{w[0]}{k});color:var(--{w[0]}{k}i)}}" for w in LEGENDS for k in range(STEPS))
    style = STYLE.replace("LIGHT", variables(False)).replace("DARKVARS", dark).replace("FACE", face(parts)).replace("SHADES", rules)
    sections = []
    for number, part in enumerate(parts):
        panels = []
        for what, (legend, form) in LEGENDS.items():
            groups, low, high = painted(part, what)
            key = "".join(f'<i class="{what[0]}{k}"></i>' for k in range(STEPS))
            spans = "".join(f'<span class="{what[0]}{k}" data-i="{i}" data-n="{n}" tabindex="{0 if i == 1 else -1}">{shown(text)}</span>' for i, n, k, text in groups)
            panels.append(f'<div><h3>{legend}</h3><div class="key">{form.format(low)} <span>{key}</span> {form.format(high)}</div>'
                          f'<pre lang="{part["lang"]}" class="{what}">{shown(part["tokens"][0])}{spans}</pre></div>')  # fmt: skip
        sections.append(
            f'<section data-part="{number}"><h2>{html.escape(part["title"])}</h2><p class="soft">{html.escape(part["note"])}</p><div class="pair">{"".join(panels)}</div></section>'
        )
    kept = [{key: part[key] for key in ("tokens", "depth", "surprisal", "probability", "runs", "recursions")} for part in parts]
    rounded = json.dumps(json.loads(json.dumps(kept), parse_float=lambda v: round(float(v), 4)), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    intro = ("A router decides at each layer whether to skip it, run it once, or recurse. Left: what it spent on predicting each token, at the token before. "
             "Right: how hard that token was to predict for a separate model that spends the same on all. Where depth follows difficulty, the same places stand out on both sides.")  # fmt: skip
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
            f'<style>{style}</style></head><body><header><div><h1>{html.escape(title)}</h1><p>{intro}</p>'
            f'<p class="soft">Hover over a token, or press Tab and move with the arrow keys. Tokens that are written as one sign are coloured together, by their mean.</p></div><button id="theme" type="button">Light / dark</button></header>'
            f'<main>{"".join(sections)}</main><div id="bar" role="status" aria-live="polite"><div class="soft">No token chosen yet.</div></div>'
            f'<script id="data" type="application/json">{rounded}</script><script>{SCRIPT.replace("SHADE", str(STEPS - 1))}</script></body></html>')  # fmt: skip
