"""Draw the figures that compare runs. Equal runs give equal pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, product
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

from raysl.errors import explained
from raysl.evaluation.results import describe_images
from raysl.probes.invariance import HEADS, HISTOGRAM, OTHERS
from raysl.reporting.figure import Figure, panels_png, plot_png
from raysl.reporting.report_runs import Group, LabeledRow, ReportRun, by_protocol, labels, layers
from raysl.reporting.tables import estimates
from raysl.storage.records import verified

# Baselines without training.
_LINES = {"untrained": "--", "raw pixels": ":"}


def colors(labels: Sequence[str]) -> dict[str, Any]:
    """Return a color for each label; baselines without training are gray."""
    own = [label for label in dict.fromkeys(labels) if not label.startswith(tuple(_LINES))]
    chosen = colormaps["tab10" if len(own) <= 10 else "tab20"]
    return {label: chosen(own.index(label) % chosen.N) if label in own else "gray" for label in labels}


def per_layer(rows: Sequence[LabeledRow]) -> Iterator[Figure]:
    """Yield the primary metric by layer, one figure for each probe and protocol."""
    for key, members in by_protocol([item for item in rows if item.row["primary"]]):
        found, places = estimates(members), layers(members)
        if len(places) < 2:
            continue
        name, ylabel = members[0].row["name"], f"{key[0]} {members[0].row['name']}"
        colored = colors([item.label for item in members])

        def draw(
            axes: Any, found: Any = found, places: Any = places, colored: Any = colored, ylabel: str = ylabel
        ) -> None:
            for label, color in colored.items():
                of_label = {layer: cell for (one, layer, _), cell in found.items() if one == label}
                seen = [i for i, layer in enumerate(places) if layer in of_label]
                cells = [of_label[places[i]] for i in seen]
                means = [cell.mean for cell in cells]
                # The interval of two seeds may be ten times as wide as the whole picture.
                spreads = [(cell.half_width or 0.0) if len(cell.values) > 2 else 0.0 for cell in cells]
                line = next((line for start, line in _LINES.items() if label.startswith(start)), "-")
                look = {"fmt": line, "marker": "o", "markersize": 4, "capsize": 2}
                axes.errorbar(seen, means, spreads, label=label, color=color, **look)
                dots = [(i, value) for i, cell in zip(seen, cells, strict=True) for value in cell.values]
                axes.plot(*zip(*dots, strict=True), ".", color=color, alpha=0.4)
            axes.set_xticks(range(len(places)), places)
            values = [value for cell in found.values() for value in cell.values]
            # All seeds are shown, but not all of the intervals.
            room = 0.15 * ((max(values) - min(values)) or abs(values[0]) or 1.0)
            axes.set_ylim(min(values) - room, max(values) + room)
            axes.legend(fontsize=7)
            axes.set_ylabel(ylabel)

        text = (
            f"{name} of the probe {key[0]} by layer: means, a dot for each seed, and 95 % confidence intervals for "
            f"three or more seeds, cut at the edges of the picture. {_hashes(key)}"
        )
        yield Figure(f"layers-{key[0]}-{_short(key)}", f"{key[0]} by layer", text, plot_png(draw, 8.0))


def _short(key: Sequence[str]) -> str:
    return "-".join(part[:8] for part in key[1:] if part)


def _hashes(key: Sequence[str]) -> str:
    return f"Protocol {key[1]}, {describe_images(key[2], key[3])}."


Counts = Mapping[str, Mapping[str, Sequence[int]]]


def histograms(gathered: Sequence[Group]) -> Iterator[Figure]:
    """Yield histograms of the distance between f(I) and f(t(I)), as in PIRL (Misra and van der Maaten 2020, figure 5).

    One figure for each protocol, with a panel for each transform. It shows the last layer, and the embeddings of the
    heads if a method compares those.
    """
    # By test set and protocol, by label, by step.
    together: dict[tuple[str, str], dict[str, dict[int, list[Counts]]]] = {}
    edges: list[float] = []
    label_of = labels(gathered)
    for group in gathered:
        for member in group.runs:
            for (encoder, test, protocol), (step, value) in _newest_histograms(member).items():
                if encoder != "pixels":
                    edges = value["edges"]
                    by_step = together.setdefault((test, protocol), {})
                    of_label = by_step.setdefault(label_of(encoder, group, member), {})
                    of_label.setdefault(step, []).append(value["counts"])
    for (test, protocol), by_label in sorted(together.items()):
        # As in tables: runs that were probed at different steps are not seeds of one measurement.
        apart = {
            label if len(by_step) == 1 else f"{label}, step {step}": counts
            for label, by_step in by_label.items()
            for step, counts in sorted(by_step.items())
        }
        png, layer = _histogram(apart, edges)
        text = (
            f"Distribution of the distance between the unit features ({layer}) of an image and of its transformed "
            "copy, over all seeds. Filled: distance between the embeddings of the heads. Dotted: distance between "
            f"different images. Protocol {protocol}, images {test}."
        )
        yield Figure(f"invariance-{protocol}-{test}", "Invariance", text, png)


def _newest_histograms(member: ReportRun) -> dict[tuple[str, str, str], tuple[int, dict[str, Any]]]:
    """Return (step, histogram) of the newest step by (encoder, test set, protocol)."""
    folder = member.run.folder / "probes/invariance"
    newest: dict[tuple[str, str, str], tuple[int, str]] = {}
    for name in folder.list():
        parts = name.rsplit("-", 3)
        if len(parts) == 4 and parts[1].isdecimal() and (folder / name).exists(HISTOGRAM):
            encoder, at_step, test, protocol = parts
            key = encoder, test, protocol
            newest[key] = max(newest.get(key, (-1, "")), (int(at_step), name))
    found = {}
    for key, (step, name) in newest.items():
        what = f"The file {folder / name}/{HISTOGRAM} is damaged"
        with explained(what, "Delete it and run `raysl probe` again.", ValueError):
            found[key] = step, verified((folder / name).read_json(HISTOGRAM))
    return found


def _histogram(by_label: Mapping[str, Sequence[Counts]], edges: Sequence[float]) -> tuple[bytes, str]:
    """Return the picture and the layer that it shows."""
    some = next(iter(by_label.values()))[0]
    layer = "pooled" if "pooled" in some else list(some)[-1]
    places = [one.get(place, {}) for one in chain(*by_label.values()) for place in (layer, HEADS)]
    transforms = [name for name in dict.fromkeys(chain(*places)) if name != OTHERS]
    colored = colors(list(by_label))

    def shares(label: str, place: str, name: str) -> Any:
        counts = np.sum([one[place][name] for one in by_label[label] if name in one.get(place, {})], axis=0)
        return counts / np.sum(counts) if np.ndim(counts) else None

    def panel(name: str) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            for label, place in product(by_label, (layer, HEADS)):
                moved, others = shares(label, place, name), shares(label, place, OTHERS)
                if moved is not None:
                    look = {"fill": True, "alpha": 0.35} if place == HEADS else {}
                    named = f"{label}, heads" if place == HEADS else label
                    axes.stairs(moved, edges, color=colored[label], label=named, **look)
                    axes.stairs(others, edges, color=colored[label], linestyle=":", alpha=0.7)
            axes.set_xlabel("distance of unit features")
            axes.set_ylabel("share of images")
            axes.legend(fontsize=7)

        return draw

    return panels_png({name: panel(name) for name in transforms}), layer


def invariance_map(rows: Sequence[LabeledRow]) -> Iterator[Figure]:
    """Yield the invariance of each layer to each transform, a panel for each label; one figure for each protocol."""
    shown = [i for i in rows if i.row["probe"] == "invariance" and i.row["name"].startswith("closer/")]
    for key, members in by_protocol(shown):
        found, places = estimates(members), layers(members)
        transforms = list(dict.fromkeys(item.row["name"] for item in members))
        if len(places) < 2:
            continue

        def panel(label: str, found: Any = found, places: Any = places, names: Any = transforms) -> Any:
            # Methods without heads have no column for them.
            own = [layer for layer in places if any((label, layer, name) in found for name in names)]
            cells = [[found.get((label, layer, name)) for layer in own] for name in names]
            means = np.array([[cell.mean if cell else np.nan for cell in row] for row in cells])

            def draw(axes: Any) -> None:
                axes.grid(visible=False)
                # Blue: invariant. White: chance. Red: a transformed copy is farther away than other images.
                axes.imshow(means, vmin=0, vmax=1, cmap="RdBu", aspect="auto")
                for (j, i), value in np.ndenumerate(means):
                    if cell := cells[j][i]:
                        color = "white" if abs(value - 0.5) > 0.3 else "black"
                        half = (max(cell.values) - min(cell.values)) / 2
                        text = f"{value:.2f}\n± {half:.2f}" if len(cell.values) > 1 else f"{value:.2f}"
                        axes.text(i, j, text, ha="center", va="center", fontsize=7, color=color)
                axes.set_xticks(range(len(own)), own, fontsize=7)
                axes.set_yticks(range(len(names)), [name.partition("/")[2] for name in names], fontsize=7)

            return draw

        text = (
            "The probability that a transformed image is closer to its original than another image is: 1 is full "
            "invariance, 0.5 is chance, and at 0 it is always farther. Means over seeds, ± half of their range. "
            f"{_hashes(key)}"
        )
        labels = [label for label in dict.fromkeys(item.label for item in members) if label != "raw pixels"]
        png = panels_png({label: panel(label) for label in labels})
        yield Figure(f"invariance-map-{_short(key)}", "Transforms and layers", text, png)


def _curve(member: ReportRun) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    losses_n = member.metrics.get("loss", np.empty(0))
    there_n = ~np.isnan(losses_n)
    return member.metrics.get("epoch", losses_n)[there_n], losses_n[there_n]


def losses(gathered: Sequence[Group]) -> Iterator[Figure]:
    """Yield training curves: a panel for each group, because losses of different methods have no common scale."""
    shown = [group for group in gathered if any(_curve(member)[0].size for member in group.runs)]

    def panel(group: Group) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            for member in group.runs:
                epochs_n, losses_n = _curve(member)
                # A line needs two points; a single row of metrics is drawn as a marker.
                marker = "o" if len(epochs_n) == 1 else ""
                axes.plot(epochs_n, losses_n, linewidth=1, marker=marker, label=f"seed {member.seed}")
            axes.set_xlabel("epoch")
            axes.set_ylabel("loss")
            axes.legend(fontsize=7)

        return draw

    if shown:
        text = "Training loss, averaged between two rows of metrics; a line is a run."
        png = panels_png({group.label: panel(group) for group in shown})
        yield Figure("training", "Training", text, png)


def progress(gathered: Sequence[Group]) -> Iterator[Figure]:
    """Yield results of probes at several steps of the same runs, for the last layer."""
    rows = [
        LabeledRow(group.label, row)
        for group in gathered
        for member in group.runs
        for row in member.rows
        if row["primary"] and row["encoder"] == "trained"
    ]
    for key, members in by_protocol(rows):
        layer = layers(members)[-1]
        # A line for each seed, because seeds may have been probed at different steps.
        points: dict[tuple[str, int], dict[int, float]] = {}
        for item in members:
            if item.row["layer"] == layer:
                of_seed = points.setdefault((item.label, item.row["seed"]), {})
                of_seed[item.row["step"]] = item.row["value"]
        curves = {of: sorted(by_step.items()) for of, by_step in points.items() if len(by_step) > 1}
        if not curves:
            continue
        name, colored = members[0].row["name"], colors([label for label, _ in points])

        ylabel = f"{key[0]} {name}"

        def draw(axes: Any, curves: Any = curves, colored: Any = colored, ylabel: str = ylabel) -> None:
            named = set()
            for (label, _), curve in curves.items():
                legend = "" if label in named else label
                axes.plot(*zip(*curve, strict=True), "o-", markersize=3, label=legend, color=colored[label])
                named.add(label)
            axes.set_xlabel("step")
            axes.set_ylabel(ylabel)
            axes.legend(fontsize=7)

        text = f"{name} of {key[0]} on {layer} at steps during training, a line for each seed. {_hashes(key)}"
        png = plot_png(draw, 8.0)
        yield Figure(f"progress-{key[0]}-{_short(key)}", f"{key[0]} during training", text, png)
