"""What a router does: difficulty of tokens, statistics with controls, interventions, oracle, and a text coloured by depth.

Depth and difficulty belong to a *place*: at place t a model has read token t and is to predict token t + 1. Depth is what it spends
there; surprisal is that of the token it then has to predict; frequency, kind and place in the word are those of the token it has read,
for a router sees no more. Arrays over places have shape [n, L], windows of tokens [n, L + 1], applications [N, n, L].
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import torch

import morlib

MEASURES = {
    "surprisal": "surprisal of the next token (nats)",
    "entropy": "entropy of the prediction (nats)",
    "ngram": "trigram surprisal of the next token (nats)",
    "read": "surprisal of the token just read (nats)",
    "frequency": "frequency of the token read (per 1,000)",
    "position": "position in the window (tokens)",
    "in_word": "position in the word (tokens)",
}
PAGE = 3_000  # characters of a reader's own text that are shown


# ---- Difficulty, in several meanings ----


def surfaces(tokenizer, ids) -> list[str]:
    """The text of each token; a byte piece stays <0xNN>, but for the newline."""
    if tokenizer.kind == "char":
        return [tokenizer.itos[int(i)] for i in ids]
    return ["\n" if int(i) == tokenizer.newline[0] else tokenizer.pieces.id_to_piece(int(i)).replace("\u2581", " ") for i in ids]


def kinds(tokenizer, ids) -> tuple[np.ndarray, np.ndarray]:
    """Kind of each token, and its place in its word (0: it begins one, or belongs to none).

    A piece that holds a hasanta is a conjunct wherever it stands; of the others, one that begins a word is word-initial, one
    that ends a word a suffix, one between them a continuation.
    """
    texts, char = surfaces(tokenizer, ids), tokenizer.kind == "char"
    bare = [t.strip(" ") for t in texts]
    wordy = [any(unicodedata.category(c)[0] in "LM" for c in t) and not t.startswith("<0x") for t in bare]
    wordy = [w or (char and t in ("'", "\u2019") and 0 < i < len(bare) - 1 and wordy[i - 1] and wordy[i + 1]) for i, (w, t) in enumerate(zip(wordy, bare))]
    begins = [w and (i == 0 or not wordy[i - 1] or texts[i][0] == " ") for i, w in enumerate(wordy)]
    found, place = [], np.zeros(len(texts), dtype=int)
    for i, (text, core) in enumerate(zip(texts, bare)):
        place[i] = place[i - 1] + 1 if wordy[i] and not begins[i] else 0
        if text == "\n" or not core:
            kind = "newline" if text == "\n" else "space"
        elif core.startswith("<0x") and not char:
            kind = "byte"
        elif not wordy[i] or (char and not core.isalpha()):
            categories = {unicodedata.category(c)[0] for c in core}
            kind = "digit" if "N" in categories else "danda" if set(core) & set("\u0964\u0965") else "sign" if "M" in categories else "punctuation"
        elif char:
            kind = "capital" if core.isupper() else "letter"
        elif "\u09cd" in core:
            kind = "conjunct"
        else:
            last = i + 1 == len(texts) or begins[i + 1] or not wordy[i + 1]
            kind = "word-initial" if begins[i] else "suffix" if last else "continuation"
        found.append(kind)
    return np.array(found), place


def places(corpus, meter, most: int, part: str = "heldout") -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Windows [n, L + 1] of a part, and at each place the MEASURES, `kind` and `token`; the meter is an independent fixed-depth model."""
    length, ids = meter.cfg.max_len, corpus.ids[part]
    where = replace(corpus, ids={part: torch.arange(len(ids))}).windows(part, length, most)
    windows, read, target = ids[where], where[:, :-1].numpy(), where[:, 1:].numpy()
    seen = morlib.score(meter, windows)
    surprisal, entropy = seen["surprisal"].numpy(), seen["entropy"].numpy()
    before = {"val": "train", "heldout": "val"}[part]
    trigram = morlib.ngram_surprisal(corpus.ids["train"], torch.cat([corpus.ids[before][-2:], ids]), 3, corpus.vocab_size)[0]
    count = torch.bincount(corpus.ids["train"], minlength=corpus.vocab_size).numpy()
    kind, in_word = kinds(corpus.tokenizer, ids)
    just_read = np.concatenate([np.full((len(windows), 1), np.nan), surprisal[:, :-1]], axis=1)
    return windows, dict(
        surprisal=surprisal, entropy=entropy, ngram=trigram[target], read=just_read, frequency=1000 * count[ids.numpy()[read]] / count.sum(),
        position=np.broadcast_to(np.arange(read.shape[1]), read.shape), in_word=in_word[read], kind=kind[read], token=ids.numpy()[read])  # fmt: skip


def groups(values: np.ndarray, most: int = 10) -> np.ndarray:
    """Groups 0, 1, ... of about equal size, from low to high; equal values share a group, missing ones are -1."""
    edges = np.unique(np.nanquantile(values, np.arange(1, most) / most))
    found = np.unique(np.searchsorted(edges, values), return_inverse=True)[1].reshape(values.shape)
    return np.where(np.isnan(values), -1, found)


def rates(actions: torch.Tensor, group: np.ndarray) -> pd.DataFrame:
    """Per group: places, first decisions of a layer that skip, forward, recurse (%), and mean depth. actions [N, R, n, L]."""
    first, depth = actions[:, 0].numpy(), (actions >= morlib.FORWARD).sum((0, 1)).numpy()
    frame = pd.DataFrame({name: 100 * (first == a).mean(0).flatten() for a, name in enumerate(morlib.ACTIONS)})
    frame["depth"], frame["group"] = depth.flatten(), group.flatten()
    return frame.groupby("group").agg(places=("depth", "size"), **{c: (c, "mean") for c in (*morlib.ACTIONS, "depth")})


# ---- Is it real: statistics ----


def interval(values) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval by Student's t; without an interval for fewer than three seeds."""
    values = np.asarray(values, dtype=float)
    if len(values) < 3 or np.ptp(values) == 0:
        return float(values.mean()), np.nan, np.nan
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def within(values: np.ndarray, factors: list[np.ndarray], sweeps: int = 10) -> np.ndarray:
    """What is left of values when the means of each factor's groups are taken out, in turns until they settle (backfitting)."""
    codes = [np.unique(f, return_inverse=True)[1].reshape(-1) for f in factors]
    left = values - values.mean()
    for _ in range(sweeps if len(codes) > 1 else 1):
        for code in codes:
            left = left - (np.bincount(code, left) / np.bincount(code))[code]
    return left


def rank_correlation(x: np.ndarray, y: np.ndarray, given: list[np.ndarray] = (), draws: int = 400, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's correlation of x and y [n, L] within the groups of the given factors, and its 95 % interval over windows.

    Neighbours in a text are not independent, so whole windows are drawn (cluster bootstrap). Missing places are left out.
    """
    known = ~(np.isnan(x) | np.isnan(y))
    a, b = (within(scipy.stats.rankdata(v[known]), [f[known] for f in given]) for v in (x, y))
    if np.ptp(a) < 1e-9 or np.ptp(b) < 1e-9:
        return 0.0, 0.0, 0.0
    row = np.nonzero(known)[0]
    sums = np.stack([np.bincount(row, w, minlength=len(x)) for w in (a * b, a * a, b * b, a, b, np.ones_like(a))])  # [6, n]
    drawn = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), size=draws)  # [draws, n]
    ab, aa, bb, sa, sb, n = sums @ np.vstack([np.ones(len(x)), drawn]).T
    r = (ab - sa * sb / n) / np.sqrt((aa - sa**2 / n) * (bb - sb**2 / n))
    return float(r[0]), *map(float, np.percentile(r[1:], [2.5, 97.5]))


def variance_explained(values: np.ndarray, factors: dict[str, np.ndarray]) -> dict[str, float]:
    """Share (%) of the variance of values [..., n, L] that each factor adds to those before it; `rest` is what none explains.

    Group means are learnt on one half of the windows and tried on the other, so that many small groups explain nothing by chance.
    """
    y = values.astype(float).flatten() - values.mean()
    odd = np.broadcast_to(np.arange(values.shape[-2])[:, None] % 2 == 1, values.shape).flatten()
    total, shares = y.var(), {}
    for name, factor in factors.items():
        code = np.unique(np.broadcast_to(factor, values.shape), return_inverse=True)[1].reshape(-1)
        before, fitted = y.var(), np.empty_like(y)
        for half in (odd, ~odd):
            sums, count = (np.bincount(code[half], w, minlength=code.max() + 1) for w in (y[half], np.ones(half.sum())))
            fitted[~half] = (sums / (count + 1))[code[~half]]
        if (y - fitted).var() < before:  # means that do not hold on the other half explain nothing
            y = y - fitted
        shares[name] = 100 * (before - y.var()) / total if total else 0.0
    return shares | {"rest": 100 * y.var() / total if total else 0.0}


def verdict(correlations: pd.DataFrame) -> str:
    """Whether depth follows difficulty, from one row a model and seed: rank correlations `raw`, `given` frequency and position, and
    `same`, given the very token read and its position.

    A claim needs six seeds. "yes" needs `raw` above zero and `given` above zero and above both controls, each beyond its 95 % interval
    over seeds; whether the router tells hard from easy places of one token too is then what `same` says.
    """
    wide = correlations.pivot(index="seed", columns="model")
    means = {c: interval(wide[c]["mor"]) for c in ("raw", "given", "same")}
    texts = {c: f"{mean:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if low == low else "") for c, (mean, low, high) in means.items()}
    numbers = f"rank correlation {texts['raw']}; given frequency and position {texts['given']}; given the token and position {texts['same']}"
    controls = [m for m in correlations["model"].unique() if m != "mor"]

    def level(column):  # a control that does as well, "zero", or None
        beaten = {c: interval(wide[column]["mor"] - wide[column][c])[1] > 0 for c in controls}
        return "zero" if not means[column][1] > 0 else next((f"{c} routing" for c in controls if not beaten[c]), None)

    if len(wide) < 6:
        answer = f"open, {len(wide)} seed(s) are too few for a claim (6 or more)"
    elif means["raw"][2] < 0:
        answer = "no, depth falls with difficulty"
    elif not means["raw"][1] > 0:
        answer = "no, depth does not rise with difficulty"
    elif level("given") == "zero":
        answer = "no, what there is goes with frequency and position"
    elif level("given"):
        answer = f"no, {level('given')} shows as much"
    else:
        answer = "yes, but only by which token was read" if level("same") else "yes, also among places that read the same token"
    return f"{answer}: {numbers}"


# ---- Does it help: decisions made elsewhere ----


def applications(actions: torch.Tensor) -> torch.Tensor:
    """[N, n, L]: how often each layer ran each token, from actions [N, R, n, L]."""
    return (actions >= morlib.FORWARD).sum(1)


def forced(model, windows: torch.Tensor, plan: torch.Tensor, batch_size: int = 128) -> np.ndarray:
    """Surprisal [n, L] of a model whose router is overruled: plan [N, n, L] says how often each layer runs each token.

    What is run has the weight that the router gives it, also where the router would have skipped.
    """
    policy, found, device = model.policy, [], next(model.parameters()).device
    try:
        for some, batch in zip(plan.split(batch_size, dim=1), windows.split(batch_size)):
            model.policy = morlib.Planned(some.to(device), policy)
            found.append(morlib.score(model, batch)["surprisal"])
    finally:
        model.policy = policy
    return torch.cat(found).numpy()


def plans(own: torch.Tensor, hardness: np.ndarray, most: int, seed: int = 0) -> dict[str, tuple[torch.Tensor, np.ndarray]]:
    """The interventions: name to (plan [N, n, L], the places [n, L] it is about), from a router's own plan and the places' hardness."""
    rng, everywhere = np.random.default_rng(seed), np.ones(hardness.shape, dtype=bool)
    free = (own == 0).flatten(1).any(1)  # layers that the router may skip

    def reordered(order):  # the own columns [N] of each sequence, dealt out anew
        return own.gather(2, torch.as_tensor(order).expand_as(own))

    deepest = own.sum(0).argsort(dim=1, descending=True, stable=True).numpy()
    by_hardness = np.argsort(np.argsort(-hardness, axis=1), axis=1)  # 0: the hardest of its sequence
    reach = torch.stack([(own > r).double().mean((1, 2)) for r in range(most)], dim=1)  # [N, R]
    level = torch.zeros(reach.numel()).index_fill(0, reach.flatten().topk(int(own.sum(0).double().mean().round()))[1], 1).view_as(reach).sum(1)
    found = {
        "depths shuffled in each sequence": (reordered(rng.permuted(np.broadcast_to(np.arange(hardness.shape[1]), hardness.shape), axis=1)), everywhere),
        "the same depth for all": (level.long()[:, None, None].expand_as(own).contiguous(), everywhere),
        "deepest to the hardest": (reordered(np.take_along_axis(deepest, by_hardness, 1)), everywhere),
        "deepest to the easiest": (reordered(np.take_along_axis(deepest, hardness.shape[1] - 1 - by_hardness, 1)), everywhere),
    }
    rank = scipy.stats.rankdata(hardness, method="ordinal").reshape(hardness.shape) / hardness.size
    tenths = {"hardest": rank > 0.9, "random": rng.permutation(rank.flatten()).reshape(rank.shape) > 0.9, "easiest": rank <= 0.1}
    for name, tenth in tenths.items():
        skipped = torch.where(free[:, None, None] & torch.as_tensor(tenth), 0, own)
        found[f"{name} tenth skips every layer that can be skipped"] = skipped, tenth
    for name, tenth in tenths.items() if most > 1 else ():
        open_to_more = (own > 0) & (own < most) & torch.as_tensor(tenth)
        layer = (open_to_more * (1 + reach[:, 1][:, None, None])).argmax(0)  # of its layers the one that recurses most
        more = torch.zeros_like(own).scatter(0, layer[None], 1) * open_to_more
        found[f"{name} tenth recurses once more"] = own + more, tenth
    return found


def interventions(model, windows: torch.Tensor, hardness: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Change in loss (nats) where each intervention was made, with its 95 % interval over windows, and over all places; change in E."""
    own = applications(morlib.score(model, windows)["actions"])
    before, rows = forced(model, windows, own), []
    drawn = np.vstack([np.ones(len(own[0])), np.random.default_rng(seed).multinomial(len(own[0]), np.full(len(own[0]), 1 / len(own[0])), size=400)])
    for name, (plan, where) in plans(own, hardness, model.cfg.max_recursions, seed).items():
        change = forced(model, windows, plan) - before
        there = drawn @ (change * where).sum(1) / (drawn @ where.sum(1))
        low, high = np.percentile(there[1:], [2.5, 97.5])
        rows.append(dict(intervention=name, there=there[0], low=low, high=high, everywhere=change.mean(), depth=float((plan - own).sum(0).double().mean())))
    return pd.DataFrame(rows)


@torch.no_grad()
def oracle(model, windows: torch.Tensor, meter, most: int, seed: int = 0) -> dict[str, float]:
    """What the best application count of one layer at one place would be worth: one place in each of at most so many windows.

    Tried: every count of every layer that the router may skip, all else as it is. `hindsight` picks by the token that did come,
    which no router can; `foresight` by the cross-entropy with the meter's prediction, and is then judged by the token that came.
    """
    windows = windows[torch.linspace(0, len(windows) - 1, min(most, len(windows))).round().long()]
    n, device = len(windows), next(model.parameters()).device
    own, row = applications(morlib.score(model, windows)["actions"]), torch.arange(n)
    at = torch.as_tensor(np.random.default_rng(seed).integers(windows.shape[1] - 1, size=n))
    belief = meter(windows[:, :-1].to(device)).logits[row, at].cpu().softmax(-1)
    policy, tried = model.policy, []
    free = (own == 0).flatten(1).any(1).nonzero()[:, 0].tolist()
    for layer, count in [(0, None)] + [(layer, count) for layer in free for count in range(model.cfg.max_recursions + 1)]:
        plan = own.clone()
        if count is not None:
            plan[layer, row, at] = count
        model.policy = morlib.Planned(plan.to(device), policy)
        logp = model(windows[:, :-1].to(device), sampling=False).logits[row, at].cpu().log_softmax(-1)
        tried.append(torch.stack([-logp[row, windows[row, at + 1]], -(belief * logp).sum(-1)]))
    model.policy = policy
    if not free:
        return dict.fromkeys(("hindsight", "foresight", "decision", "ran", "skipped", "agreement"), np.nan) | dict(places=n, layers=0, loss=float(tried[0][0].mean()))
    (loss, expected), tried = tried[0], torch.stack(tried[1:]).view(len(free), -1, 2, n).numpy()
    loss, expected = loss.numpy(), expected.numpy()
    chosen = own[free, row[:, None], at[:, None]].T.numpy()  # [F, n]
    benefit = tried[:, 0, 1] - tried[:, 1, 1]  # [F, n] of running once against skipping, in foresight
    flat = tried.reshape(-1, 2, n)
    ran, layers = chosen > 0, np.broadcast_to(np.arange(len(free))[:, None], chosen.shape)
    a, b = (within(scipy.stats.rankdata(v), [layers.flatten()]) for v in (benefit, chosen))
    agree = a @ b / np.sqrt((a @ a) * (b @ b)) if a.any() and b.any() else 0.0
    return dict(places=n, layers=len(free), loss=float(loss.mean()), hindsight=float((loss - flat[:, 0].min(0)).mean()),
                foresight=float((loss - flat[flat[:, 1].argmin(0), 0, np.arange(n)]).mean()),
                decision=float((expected - tried[:, :, 1].min(1)).mean()), ran=float(benefit[ran].mean()) if ran.any() else np.nan, skipped=float(benefit[~ran].mean()) if not ran.all() else np.nan,
                agreement=float(agree))  # fmt: skip


# ---- Bangla: what a tokenizer does with its writing ----

CONSONANT = "[\u0995-\u09b9\u09ce\u09dc-\u09df]\u09bc?"
CONJUNCT = re.compile(f"{CONSONANT}(?:\u200d?\u09cd\u200d?{CONSONANT})+")
VOWEL_SIGN = re.compile("[\u09be-\u09c4\u09c7\u09c8\u09cb\u09cc\u09d7]")


def cuts(tokenizer, text: str) -> set[int]:
    """Places in an NFC text at which one token ends and the next begins."""
    found, at, held = set(), 0, b""
    for token in surfaces(tokenizer, tokenizer.encode(text)):
        if token.startswith("<0x") and tokenizer.kind != "char":
            held += bytes([int(token[3:5], 16)])
            token = held.decode(errors="ignore")  # empty until a character is complete
            held = b"" if token else held
        at += len(token)
        found.add(at)
    return found


def segmentation(tokenizer, text: str) -> dict[str, float]:
    """How a tokenizer cuts an NFC text: fertility (tokens a word), byte tokens, conjuncts kept whole, vowel signs cut from their letter (%)."""
    tokens, at = surfaces(tokenizer, tokenizer.encode(text)), cuts(tokenizer, text)
    conjuncts, signs = list(CONJUNCT.finditer(text)), [m.start() for m in VOWEL_SIGN.finditer(text)]
    share = lambda hits, all: 100 * sum(hits) / max(len(all), 1)  # noqa: E731
    return {
        "tokens": tokenizer.vocab_size,
        "fertility (tokens a word)": sum(t != "\n" for t in tokens) / len(text.split()),
        "bytes a token": len(text.encode()) / len(tokens),
        "byte tokens (%)": share((t.startswith("<0x") and tokenizer.kind != "char" for t in tokens), tokens),
        "conjuncts whole (%)": share((not at & set(range(m.start() + 1, m.end())) for m in conjuncts), conjuncts),
        "vowel signs cut off (%)": share((start in at for start in signs), signs),
    }


# ---- Studies of the router (notebook 02) ----

KINDS = {"fixed": ("fixed depth", "o"), "mor": ("MoR", "s"), "random": ("random routing", "^")}
SOURCE_POINTS = ((12, 22.76), (8.0, 22.76), (6, 39.87), (5.89, 49.67))  # (E, accuracy in %) that the thesis and the paper report: experiment 1 both, experiment 2 both


def front_table(front: pd.DataFrame) -> pd.DataFrame:
    """Mean E, loss and accuracy by kind and asked depth, from records whose models are named "kind depth" ("mor 8")."""
    named = front["model"].str.split(expand=True)
    return front.assign(kind=named[0], asked=named[1].astype(int)).groupby(["kind", "asked"])[["effective_depth", "loss", "accuracy"]].mean()


def draw_front(front: pd.DataFrame):
    """Held-out loss and accuracy against effective depth: fixed depth, MoR and random routing, dots are seeds; and the sources' points."""
    morlib.figure_style()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    means = front_table(front)
    for ax, metric in zip(axes, ("loss", "accuracy", "accuracy")):
        for kind, (label, marker) in KINDS.items():
            if kind in means.index:
                line = ax.plot(means.loc[kind]["effective_depth"], means.loc[kind][metric], marker=marker, markersize=5, label=label)[0]
                own = front[front["model"].str.startswith(kind + " ")]
                ax.scatter(own["effective_depth"], own[metric], s=7, alpha=0.5, color=line.get_color())
        ax.set(xlabel="effective depth E", ylabel="held-out loss (nats a token)" if metric == "loss" else "held-out accuracy (%)")
    depths, accuracy = zip(*SOURCE_POINTS)
    axes[2].scatter(depths, accuracy, marker="x", color="black")
    axes[0].legend()
    axes[2].annotate("the sources' points", (10, SOURCE_POINTS[0][1]), xytext=(0, 5), textcoords="offset points", ha="center")
    return figure


def front_lines(front: pd.DataFrame) -> list[str]:
    """What the front says: at how many depths MoR has the lower loss, what depth itself is worth, and how well E was held."""
    loss, lines = front_table(front)["loss"].unstack("kind"), []
    fixed = loss["fixed"].dropna()
    most = fixed.index.max()  # held to all its layers MoR is the fixed model, and says nothing
    for other in ("fixed", "random"):
        both = loss.loc[loss.index < most, ["mor", other]].dropna()
        gap = both["mor"] - both[other]
        lines.append(f"MoR against {KINDS[other][0]}: lower held-out loss at {(gap < 0).sum()} of {len(gap)} depths; on average {gap.mean():+.4f} nats")
    lines.append(f"fixed depth: losses from {fixed.min():.4f} ({fixed.idxmin()} layers) to {fixed.max():.4f} ({fixed.idxmax()} layers)")
    held = front[front["model"].str.startswith("mor ")]
    held = held[held["model"].str.split().str[1].astype(float) < most]
    kinds = {"the biases that validation text set": held["effective_depth"]}
    if "followed" in held and held["followed"].notna().all():
        kinds["biases that follow the text read so far"] = held["followed"].map(lambda m: m["effective_depth"])
    asked = held["model"].str.split().str[1].astype(float)
    for name, E in kinds.items():
        off = (E - asked).abs()
        lines.append(f"E on held-out text with {name}: within 0.1 of its target in {(off <= 0.1).sum()} of {len(off)} runs, {off.max():.2f} from it at most")
    return lines


def _further(groups, digits: int) -> list[str]:
    """Where one more seed of each group is expected, empty for fewer than three."""
    ranges = [morlib.new_seed_range(values) for _, values in groups]
    return ["" if np.isnan(low) else f"{low:.{digits}f} to {high:.{digits}f}" for low, high in ranges]


def _range(groups) -> pd.Series:
    return groups.agg(lambda E: "" if E.isna().any() else f"{E.min():.2f} to {E.max():.2f}")


def by_validation(records: pd.DataFrame) -> pd.DataFrame:
    """One row a model, the best first: loss and accuracy on validation text at the end of training, E on held-out text by argmax and
    sampled, and the loss that sampling costs (nats). From three seeds on also where the validation loss of a further one is expected (95 %)."""
    last, sampled = pd.DataFrame([r["history"][-1] for r in records["record"]]), pd.DataFrame(list(records["sampled"]))
    table = pd.DataFrame({
        "model": records["model"], "validation loss": last["val_loss"], "validation accuracy (%)": last["val_accuracy"], "E": records["effective_depth"],
        "E sampled": sampled["effective_depth"], "loss sampled - argmax": sampled["loss"] - records["loss"],
    })  # fmt: skip
    grouped = table.groupby("model", sort=False)
    means = grouped.mean().assign(seeds=grouped.size())
    if any(further := _further(grouped["validation loss"], 3)):
        means.insert(1, "a new seed", further)
    means = means.sort_values("validation loss")
    return means.round({"validation loss": 4, "validation accuracy (%)": 2, "E": 2, "E sampled": 2, "loss sampled - argmax": 4})


def collapse_table(records: pd.DataFrame) -> pd.DataFrame:
    """One row a model: over all seeds the range of E, and of E with biases that follow the text (`morlib.evaluate`); of the layers that the
    budget gives a choice how many there are, how many took one action for every held-out token, and the share of each action in them (%)."""
    rows = []
    for model, record, depth in zip(records["model"], records["record"], records["effective_depth"]):
        choice = [spend != (1.0, 0.0) for spend in morlib.depth_budget(morlib.ModelConfig(**record["config"]["model"]))]
        asked = np.asarray(record["metrics"]["action_rates"])[choice, 0]  # [layers with a choice, 3]
        followed = record["metrics"].get("followed", {}).get("effective_depth", np.nan)
        collapsed = int((asked.max(-1, initial=0) == 1).sum())
        rows.append(dict(model=model, E=depth, followed=followed, asked=len(asked), collapsed=collapsed) | dict(zip(morlib.ACTIONS, 100 * asked.mean(0))))
    grouped = pd.DataFrame(rows).groupby("model", sort=False)
    return pd.DataFrame({
        "seeds": grouped.size(), "E": _range(grouped["E"]), "E, followed": _range(grouped["followed"]), "layers with a choice": grouped["asked"].mean(),
        "of them collapsed, all seeds": grouped["collapsed"].sum(), **{f"{a} (%)": grouped[a].mean().round(1) for a in morlib.ACTIONS},
    })  # fmt: skip


def sources_table(records: pd.DataFrame) -> pd.DataFrame:
    """One row a model, in the order of the records: held-out accuracy (%), loss (nats), E by argmax and sampled, and whether every seed
    trained; from three seeds on also where the accuracy of a further one is expected (95 %)."""
    sampled = [m["effective_depth"] for m in records["sampled"]]
    grouped = records.assign(sampled_depth=sampled).groupby("model", sort=False)
    table = grouped[["accuracy", "loss", "effective_depth", "sampled_depth", "did_train"]].mean().round(2)
    table["did_train"] = table["did_train"].map(lambda share: "yes" if share == 1 else "did not train")
    table = table.set_axis(["accuracy (%)", "loss (nats)", "E", "E sampled", "trained"], axis=1).assign(seeds=grouped.size())
    if any(further := _further(grouped["accuracy"], 1)):
        table.insert(1, "a new seed (%)", further)
    return table


def vocabulary_table(records: pd.DataFrame) -> pd.DataFrame:
    """One row a vocabulary, the best first: held-out bits per byte, and from three seeds on where that of a further one is expected (95 %)."""
    grouped = records.groupby("model")["bits_per_byte"]
    table = pd.DataFrame({"bits per byte": grouped.mean().round(3), "seeds": grouped.size()})
    if any(further := _further(grouped, 3)):
        table.insert(1, "a new seed", further)
    return table.sort_values("bits per byte").rename_axis("vocabulary")
