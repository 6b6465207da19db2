"""The pictures of a run, as PNG files in one style. Needs matplotlib."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import UserError
from .history import Floats, Metrics, column, mean_of_finite
from .units import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

PAPER, INK, MUTED, GRID = "#ffffff", "#17262f", "#64757f", "#e7ecee"
TIDE, CORAL, SAND = "#0b6e8f", "#e2532f", "#c08a1e"
DEPTH = ("#5cb8a9", "#2a93ab", "#12608f", "#1f2c66")  # first layer to last
LOAD = ("#1c3f6e", "#3f87ad", "#a9d0dc", "#f6f4ef", "#f4c08a", "#df7238", "#8f2413")  # idle, uniform (the middle), overloaded
LOAD_RANGE = float(np.log2(3))  # the load scale ends at a third and three times the even share

WIDE, HALF, MARGIN = (10.4, 4.3), (6.4, 4.1), 0.15  # inches
STYLE: dict[str, Any] = {
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "font.size": 10,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 150,
}
FONTS = ("Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")  # the first installed one; the others lend it missing glyphs


@dataclass
class Plot:
    """One picture: its file, what it shows, and whether it wants the full width of the page."""

    path: Path
    title: str
    wide: bool


@dataclass
class Line:
    """A drawn line, [N] points, to be named."""

    x: Floats
    y: Floats
    name: str
    color: Any

    @property
    def last(self) -> float:
        return float(self.y[-1]) if len(self.y) else float("nan")


def draw_plots(metrics: Metrics, folder: Path, layer_names: list[str], val_bpb: float | None, xz_bpb: float | None) -> list[Plot]:
    """Write every picture that the metrics have data for into `folder`, and list them in reading order.

    `layer_names` has one name per MoE layer; `val_bpb` and `xz_bpb` are bits per byte of the held-out text, under the model when training
    was over and packed by xz. Raises `UserError` when matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib import font_manager
    except ImportError:
        raise UserError("the report's plots need matplotlib: pip install 'shoal[report]'") from None

    installed = set(font_manager.get_font_names())
    plots: list[Plot] = []

    def save(name: str, title: str, figure: Figure | None, wide: bool = False) -> None:
        if figure is not None:
            figure.savefig(folder / f"{name}.png")
            plots.append(Plot(folder / f"{name}.png", title, wide))

    style: Any = {**STYLE, "font.family": [name for name in FONTS if name in installed]}
    with matplotlib.rc_context(style):
        save("loss_tokens", "Loss against tokens", _loss_against_tokens(metrics, val_bpb, xz_bpb), wide=True)
        save("loss_flops", "Loss against training FLOPs", _loss_against_flops(metrics))
        save("learning_rate", "Learning rate", _learning_rate(metrics))
        save("throughput", "Throughput", _throughput(metrics))
        save("gradient_norm", "Gradient norm", _gradient_norm(metrics))
        save("max_vio", "MaxVio", _max_vio(metrics, layer_names))
        save("routing_entropy", "Routing entropy", _routing_entropy(metrics, layer_names))
        save("expert_load", "Expert load over training", _expert_load(metrics, layer_names), wide=True)
        save("expert_load_final", "Expert load at the end", _final_load(metrics, layer_names), wide=True)
    return plots


# Loss


def _loss_against_tokens(metrics: Metrics, val_bpb: float | None, xz_bpb: float | None) -> Figure:
    tokens = metrics.column("tokens")
    figure, ax = _figure(WIDE)
    lines = _draw_loss(ax, metrics, tokens, "tokens", log=False)
    _token_axis(ax, tokens)
    floor, ceiling = _frame(metrics)
    ax.set_ylim(floor, ceiling)
    ax.set_ylabel("nats per token")
    bits = _bits_per_nat(metrics)
    if bits is not None:
        convert: Any = (lambda nats: nats * bits, lambda bpb: bpb / bits)
        right = ax.secondary_yaxis(1.0, functions=convert)
        right.spines["right"].set_visible(False)
        right.set_ylabel("bits per byte")
        if xz_bpb is not None and floor < xz_bpb / bits < ceiling:
            ax.axhline(xz_bpb / bits, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
            note = f"xz: {xz_bpb:.2f} bits per byte on the held-out text"
            place: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "ha": "right"}
            ax.annotate(note, (0.995, xz_bpb / bits), xycoords=("axes fraction", "data"), fontsize=9.5, color=MUTED, **place)
    _line_labels(ax, lines)
    _title(ax, "Loss against tokens", _loss_summary(metrics, val_bpb))
    return figure


def _loss_against_flops(metrics: Metrics) -> Figure | None:
    flops = metrics.column("flops")
    if not np.any(flops > 0):
        return None
    figure, ax = _figure(HALF)
    ax.set_xscale("log")
    lines = _draw_loss(ax, metrics, flops, "flops", log=True)
    ax.xaxis.set_major_formatter(lambda value, _: si(value))
    ax.xaxis.set_minor_formatter(lambda *_: "")
    ax.set_xlabel("training FLOPs")
    ax.set_ylabel("nats per token")
    _end_labels(ax, [(line.last, line.name, line.color) for line in lines])
    _title(ax, "Loss against training FLOPs", f"{si(np.nanmax(flops), 'FLOP')} in all")
    return figure


def _draw_loss(ax: Axes, metrics: Metrics, x: Floats, x_name: str, log: bool) -> list[Line]:
    """The training, MTP and validation curves."""
    loss, mtp = metrics.column("loss"), metrics.column("mtp_loss")
    ax.plot(x, loss, color=TIDE, alpha=0.22, linewidth=0.8)
    lines = [_draw_smooth(ax, x, loss, TIDE, name="training", log=log)]
    if np.isfinite(mtp).any():
        lines.append(_draw_smooth(ax, x, mtp, SAND, name="MTP", log=log, linewidth=1.3))
    val_loss = column(metrics.evaluations, "val_loss")
    if np.isfinite(val_loss).any():
        at = column(metrics.evaluations, x_name)
        style: dict[str, Any] = {"marker": "o", "markersize": 5, "markeredgecolor": PAPER, "markeredgewidth": 1.0}
        # The last mark lies on the edge, and is not cut. The first may lie far outside, for which the layout must not make room.
        ax.plot(at, val_loss, color=CORAL, linewidth=1.2, zorder=4, clip_on=False, in_layout=False, **style)
        lines.append(Line(at, val_loss, "validation", CORAL))
    return lines


def _frame(metrics: Metrics) -> tuple[float, float]:
    """Limits of the loss axis: the fall of the first steps would press the rest flat, so the top is what is left of it after 1.5%.

    Multi-token prediction may begin, and fall, later: it is left out of that until a tenth of the run after its first step.
    """
    begin = len(metrics.steps) * 15 // 1000
    loss, mtp = metrics.column("loss"), metrics.column("mtp_loss")
    first = int(np.isfinite(mtp).argmax())
    mtp_begin = first + len(mtp) // 10 if first else begin
    curves = [loss[begin:], mtp[mtp_begin:], column(metrics.evaluations[1:] or metrics.evaluations, "val_loss")]
    shown = np.concatenate(curves)
    shown = shown[np.isfinite(shown)]
    if not len(shown):
        return 0.0, 1.0
    low, high = float(shown.min()), float(shown.max())
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _bits_per_nat(metrics: Metrics) -> float | None:
    """Bits per byte for one nat per token: constant for a tokenizer and its text."""
    ratio = metrics.column("bpb") / metrics.column("loss")
    ratio = ratio[np.isfinite(ratio)]
    return float(np.median(ratio)) if len(ratio) else None


def _loss_summary(metrics: Metrics, val_bpb: float | None) -> str:
    """The curve has quick evaluations, on some of the documents; what a run ends with is on all of them."""
    if not metrics.evaluations:
        return f"no evaluation yet; {si(metrics.steps[-1]['tokens'])} tokens"
    last = metrics.evaluations[-1]
    quick = last["val_bpb"]
    told = quick if val_bpb is None else val_bpb
    some = "" if abs(told - quick) < 5e-4 else f" ({quick:.3f} on the part of it that the curve shows)"
    return f"{told:.3f} bits per byte on held-out text after {si(last['tokens'])} tokens{some}"


# Optimizer and machine


def _learning_rate(metrics: Metrics) -> Figure | None:
    rate = metrics.column("lr")
    if not np.isfinite(rate).any():
        return None
    figure, ax = _figure(HALF)
    tokens = metrics.column("tokens")
    ax.fill_between(tokens, rate, color=TIDE, alpha=0.12, linewidth=0)
    ax.plot(tokens, rate, color=TIDE, linewidth=2, **_dots(tokens))
    ax.set_ylim(0, 1.05 * max(1.0, float(np.nanmax(rate))))
    ax.yaxis.set_major_formatter(_percent)
    _token_axis(ax, tokens)
    _title(ax, "Learning rate", "share of its peak")
    return figure


def _gradient_norm(metrics: Metrics) -> Figure | None:
    from matplotlib.ticker import LogLocator

    norm = metrics.column("grad_norm")
    if not np.any(norm > 0):
        return None
    figure, ax = _figure(HALF)
    tokens = metrics.column("tokens")
    ax.set_yscale("log")
    ax.plot(tokens, norm, color=TIDE, alpha=0.22, linewidth=0.8)
    _draw_smooth(ax, tokens, norm, TIDE)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(lambda *_: "")
    _token_axis(ax, tokens)
    skipped = np.nan_to_num(metrics.column("skipped"))
    jumps = tokens[np.diff(skipped, prepend=0) > 0]
    ax.plot(jumps, np.full(len(jumps), 0.02), "|", color=CORAL, markersize=10, transform=ax.get_xaxis_transform())
    _title(ax, "Gradient norm", f"before clipping; steps skipped: {skipped[-1]:.0f}")
    return figure


def _throughput(metrics: Metrics) -> Figure | None:
    speed, share = metrics.column("tokens_per_second"), metrics.column("peak_share")
    if not np.isfinite(speed).any():
        return None
    panels = [(speed, "tokens per second", lambda value, _: si(value))]
    if np.isfinite(share).any():
        panels.append((share, "share of this machine's measured matmul peak", _percent))
    figure = _bare_figure(HALF)
    tokens = metrics.column("tokens")
    for index, (values, name, text) in enumerate(panels):
        ax = figure.add_subplot(len(panels), 1, index + 1)
        ax.plot(tokens, values, color=TIDE, alpha=0.22, linewidth=0.8)
        _draw_smooth(ax, tokens, values, TIDE)
        median = float(np.nanmedian(values))
        ax.set_ylim(0, 1.25 * float(np.nanpercentile(values, 99)))
        ax.locator_params(axis="y", nbins=4)
        ax.yaxis.set_major_formatter(text)
        ax.set_title(name, loc="left", fontsize=9, color=MUTED, pad=4)
        _end_labels(ax, [(median, f"median {text(median, None)}", TIDE)])
        _token_axis(ax, tokens)
        if index < len(panels) - 1:
            ax.set_xlabel("")
            ax.set_xticklabels([])
    _title(figure.axes[0], "Throughput", panels[0][1])
    return figure


# Experts


def _max_vio(metrics: Metrics, layer_names: list[str]) -> Figure | None:
    tokens, layers = metrics.layers("max_vio_layers")
    if not len(tokens):
        return None
    figure, ax = _figure(HALF)
    _draw_layers(ax, tokens, layers, linewidth=0.9, alpha=0.75)
    mean = mean_of_finite(layers, 1)
    end = _draw_smooth(ax, tokens, mean, INK, linewidth=2.2).last
    ax.set_ylim(bottom=0)
    _token_axis(ax, tokens)
    finals = mean_of_finite(layers[-_tail(len(layers)) :], 0)
    worst = int(np.nanargmax(finals))
    labels = [(end, f"mean: {end:.2f}", INK)]
    if len(finals) > 1:
        labels.append((float(finals[worst]), f"{layer_names[worst]}: {finals[worst]:.2f}", _depth_colors(len(finals))[worst]))
    _end_labels(ax, labels)
    _title(ax, "MaxVio", "load of the busiest expert over the mean, less 1; a line per layer, light to dark")
    return figure


def _routing_entropy(metrics: Metrics, layer_names: list[str]) -> Figure | None:
    tokens, layers = metrics.layers("entropy_layers")
    if not len(tokens):
        return None
    figure, ax = _figure(HALF)
    ends = _draw_layers(ax, tokens, layers, linewidth=1.5, alpha=1.0)
    ax.yaxis.set_major_formatter(_percent)
    low, high = ax.get_ylim()
    ax.set_ylim(max(0.0, low), min(high, 1.005) if high > 0.99 else high)
    _token_axis(ax, tokens)
    colors = _depth_colors(len(ends))
    named = range(len(ends)) if len(ends) <= 8 else sorted({0, len(ends) // 3, 2 * len(ends) // 3, len(ends) - 1})
    _end_labels(ax, [(ends[layer], layer_names[layer], colors[layer]) for layer in named])
    _title(ax, "Routing entropy", "share of log E: 100% is even over all experts, 0% always the same one")
    return figure


def _draw_layers(ax: Axes, tokens: Floats, layers: Floats, linewidth: float, alpha: float) -> list[float]:
    """One smoothed line per column of `layers` [R, L], coloured by depth; the last value of each."""
    colors = _depth_colors(layers.shape[1])
    style: dict[str, Any] = {"linewidth": linewidth, "alpha": alpha}
    return [_draw_smooth(ax, tokens, values, color, **style).last for values, color in zip(layers.T, colors, strict=True)]


def _expert_load(metrics: Metrics, layer_names: list[str]) -> Figure | None:
    """Small multiples: one panel per layer, experts from top to bottom, training from left to right."""
    tokens, load = metrics.layers("expert_load")
    if not len(tokens):
        return None
    layers, experts = load.shape[1:]
    groups = np.array_split(np.arange(len(tokens)), min(len(tokens), 160))
    edges = np.array([0.0] + [tokens[group[-1]] for group in groups])
    relative = np.stack([mean_of_finite(load[group], 0) for group in groups]) * experts  # [R, L, E]

    columns = min(layers, 3 if layers <= 6 else 4 if layers <= 12 else 6)
    rows = -(-layers // columns)
    figure = _bare_figure((WIDE[0], 1.3 + rows * (1.8 if columns <= 4 else 1.4)), head=0.35)
    scale = None
    for layer in range(layers):
        ax = figure.add_subplot(rows, columns, layer + 1)
        scale = ax.pcolormesh(edges, np.arange(experts + 1), _log_load(relative[:, layer].T), **_load_scale())
        ax.invert_yaxis()
        ax.grid(False)
        _token_axis(ax, tokens, ticks=3)
        ax.set_xlim(0, edges[-1])
        ax.set_yticks([0.5, experts - 0.5], ["0", str(experts - 1)])
        ax.set_title(layer_names[layer], loc="left", fontsize=9, color=INK, pad=3)
        if layer < (rows - 1) * columns:
            ax.set_xticklabels([])
            ax.set_xlabel("")
        if layer % columns:
            ax.set_yticklabels([])
        else:
            ax.set_ylabel("expert", labelpad=-4)
    assert scale is not None
    _load_bar(figure, scale)
    left, top = MARGIN / figure.get_figwidth(), 1 - MARGIN / figure.get_figheight()
    figure.text(
        left, top, f"Expert load over training: {experts} experts in each of {layers} layers", va="top", fontweight="bold", fontsize=13
    )
    return figure


def _final_load(metrics: Metrics, layer_names: list[str]) -> Figure | None:
    tokens, load = metrics.layers("expert_load")
    if not len(tokens):
        return None
    layers, experts = load.shape[1:]
    relative = mean_of_finite(load[-_tail(len(load)) :], 0) * experts  # [L, E]
    figure, ax = _figure((WIDE[0], 1.5 + max(0.22, min(0.42, 3.2 / layers)) * layers))
    scale = ax.pcolormesh(_log_load(relative), edgecolors=PAPER, linewidth=1.2 if experts <= 64 else 0.4, **_load_scale())
    ax.invert_yaxis()
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    ax.set_yticks(np.arange(layers) + 0.5, layer_names[:layers])
    step = 1 if experts <= 32 else 4 if experts <= 64 else 16
    shown = np.arange(0, experts, step)
    ax.set_xticks(shown + 0.5, [str(expert) for expert in shown])
    ax.set_xlabel("expert")
    for layer, values in enumerate(relative):
        if np.isnan(values).any():
            continue
        if experts <= 16:
            for expert, value in enumerate(values):
                color = PAPER if abs(np.log2(max(value, 1e-9))) > 1.2 else INK
                ax.text(expert + 0.5, layer + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
        ax.text(experts * 1.01, layer + 0.5, f"{values.max() - 1:.2f}", va="center", fontsize=9, color=MUTED)
    ax.text(experts * 1.01, -0.25, "MaxVio", va="bottom", fontsize=9, color=MUTED)
    _load_bar(figure, scale)
    busiest, idlest = np.nanmax(relative), np.nanmin(relative)
    _title(ax, "Expert load at the end", f"the busiest expert takes {busiest:.2f} times its even share, the idlest {idlest:.2f}")
    return figure


def _log_load(relative: Floats) -> Floats:
    return np.log2(np.maximum(relative, 2.0 ** (-LOAD_RANGE - 1)))


def _load_scale() -> dict[str, Any]:
    return {"cmap": _colormap(LOAD), "vmin": -LOAD_RANGE, "vmax": LOAD_RANGE}


def _load_bar(figure: Figure, scale: Any) -> None:
    bar: Any = figure.colorbar(scale, ax=figure.axes, location="bottom", shrink=0.36, aspect=36, pad=0.03, anchor=(0.0, 0.5), extend="both")
    bar.set_ticks([-LOAD_RANGE, -1, 0, 1, LOAD_RANGE], labels=["⅓", "½", "even share", "2 ×", "3 ×"])
    bar.outline.set_visible(False)


# Parts of a picture


def _bare_figure(size: tuple[float, float], head: float = 0.0) -> Figure:
    """A figure of its own, not pyplot's: no window system, no global state. `head` inches at the top stay free."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    x, y = MARGIN / size[0], MARGIN / size[1]
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(x, y, 1 - 2 * x, 1 - 2 * y - head / size[1]))
    return figure


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = _bare_figure(size)
    return figure, figure.add_subplot()


def _title(ax: Axes, title: str, subtitle: str) -> None:
    ax.set_title(subtitle, loc="left", fontsize=9.5, color=MUTED, pad=9)
    ax.annotate(
        title, (0, 1), xycoords="axes fraction", xytext=(0, 25), textcoords="offset points", fontsize=13, fontweight="bold", color=INK
    )


def _end_labels(ax: Axes, labels: list[tuple[float, str, Any]]) -> None:
    """Name lines at the right of the (linear) axis: (value, text, colour) each, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    figure: Any = ax.figure
    places = sorted(((value - low) / (high - low), text, color) for value, text, color in labels if np.isfinite(value))
    gap = 13 / (72 * 0.7 * figure.get_figheight())  # 13 points, where the axis takes 70% of the height
    above = -1.0
    for place, text, color in places:
        above = max(above + gap, place)
        ax.text(1.015, above, text, color=color, transform=ax.transAxes, va="center", fontsize=9.5)


def _line_labels(ax: Axes, lines: list[Line]) -> None:
    """Name lines where they lie, at 80% of the axis: the lowest from below, the highest from above; those between further left."""
    from matplotlib.patheffects import withStroke

    right = ax.get_xlim()[1]
    ordered = sorted(lines, key=lambda line: float(np.interp(0.8 * right, line.x, line.y)))
    for index, line in enumerate(ordered):
        below = index == 0 and len(lines) > 1
        at = (0.68 if 0 < index < len(lines) - 1 else 0.8) * right
        y = float(np.interp(at, line.x, line.y))
        place: dict[str, Any] = {
            "xytext": (0, -9 if below else 7),
            "textcoords": "offset points",
            "ha": "center",
            "va": "top" if below else "bottom",
        }
        ax.annotate(line.name, (at, y), color=line.color, zorder=5, path_effects=[withStroke(linewidth=3, foreground=PAPER)], **place)


def _token_axis(ax: Axes, tokens: Floats, ticks: int = 6) -> None:
    ax.set_xlim(0, float(np.nanmax(tokens)))
    ax.locator_params(axis="x", nbins=ticks)
    ax.xaxis.set_major_formatter(lambda value, _: si(value))
    ax.set_xlabel("tokens")


def _draw_smooth(
    ax: Axes, x: Floats, y: Floats, color: Any, name: str = "", log: bool = False, linewidth: float = 2.0, alpha: float = 1.0
) -> Line:
    """Draw `y` without its noise."""
    x, y = smooth(x, y, log)
    ax.plot(x, y, color=color, linewidth=linewidth, alpha=alpha, **_dots(x))
    return Line(x, y, name, color)


BINS = 120
"""Points of a smoothed line, at most."""


def smooth(x: Floats, y: Floats, log: bool = False) -> tuple[Floats, Floats]:
    """Means of the finite points in `BINS` equal parts of the (logarithmic) x axis, then a binomial filter of width 5.

    Few points stay as they are. Unlike a running average this does not lag, and on a log axis it keeps the first steps.
    """
    keep = np.isfinite(x) & np.isfinite(y) & ((x > 0) if log else True)
    x, y = x[keep], y[keep]
    if len(x) < 8:
        return x, y
    place = np.log(x) if log else x
    edges = np.linspace(place.min(), place.max(), BINS + 1)[1:-1]
    member = np.digitize(place, edges)
    count = np.bincount(member, minlength=BINS)
    filled = count > 0
    x, y = (np.bincount(member, values, minlength=BINS)[filled] / count[filled] for values in (x, y))
    if len(y) < 8:
        return x, y
    return x, np.convolve(np.pad(y, 2, mode="reflect"), np.array([1, 4, 6, 4, 1]) / 16, mode="valid")


def _dots(x: Floats) -> dict[str, Any]:
    """Style that shows a run of one or two steps, which has no line to see."""
    return {"marker": "o", "clip_on": False} if len(x) < 3 else {}


def _percent(value: float, _: object) -> str:
    return f"{100 * value:.0f}%"


def _tail(rows: int) -> int:
    """How many rows make up the end of the run: the last tenth."""
    return max(1, rows // 10)


def _depth_colors(layers: int) -> list[Any]:
    return [_colormap(DEPTH)(share) for share in np.linspace(0, 1, layers)]


def _colormap(colors: tuple[str, ...]) -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shoal", list(colors))
