"""Pictures of benchmark results: ``results/<name>.json`` to ``results/<name>.svg``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

COLOURS = {"antiphon": "#0f766e", "nemo_toolkit": "#d97706", "transformers": "#6d28d9", "aiortc": "#d97706"}
GREY = "#6b7280"
TRANSPORTS = {"antiphon": "Antiphon", "aiortc": "aiortc"}
PARTS = {
    "packet": "a packet's length",
    "codecs": "Opus, twice",
    "server_and_network": "server and loopback",
    "client_buffer": "client's playout buffer",
}


def plot_asr(path: Path) -> Path:
    """Milliseconds a chunk beside the references, and latency against the number of sessions."""
    numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
    panels = [(rows, draw) for rows, draw in ((numbers["steps"], _steps), (numbers["capacity"], _capacity)) if rows]
    pyplot.rcParams.update({"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none"})
    widths = [max(6.4, 0.7 * len(rows)) for rows, _ in panels] or [6.4]
    figure, axes = pyplot.subplots(
        1, len(widths), figsize=(sum(widths), 4.6), width_ratios=widths, squeeze=False, layout="constrained"
    )
    for axis, (rows, draw) in zip(axes[0], panels, strict=False):
        draw(axis, rows, numbers)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Streaming recognition on {numbers['device']}, {numbers['dtype'].removeprefix('torch.')}")
    target = path.with_suffix(".svg")
    figure.savefig(target)
    pyplot.close(figure)
    return target


def _steps(axis: Axes, rows: list[dict[str, Any]], numbers: dict[str, Any]) -> None:
    labels = [f"{row['shape']}\n{row['chunk_ms']} ms\n{row['sessions']} at once" for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(rows))]
        heights = [row["ms"].get(name, 0.0) for row in rows]
        bars = axis.bar(places, heights, width, label=name, color=COLOURS.get(name, GREY))
        axis.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=7, padding=1)
    floors = {(row["shape"], row["chunk_ms"], row["sessions"]): row["floor_ms"] for row in numbers["floors"]}
    for place, row in enumerate(rows):
        floor = floors.get((row["shape"], row["chunk_ms"], row["sessions"]))
        if floor:
            axis.hlines(floor, place - 0.4, place + 0.4, colors="black", linestyles="dotted")
    axis.set_yscale("log")
    axis.set_xticks(range(len(rows)), labels, fontsize=8)
    axis.set_ylabel("ms a chunk (dotted: floor)")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _capacity(axis: Axes, rows: list[dict[str, Any]], numbers: dict[str, Any]) -> None:
    for index, row in enumerate(rows):
        colour = pyplot.get_cmap("viridis")(index / max(1, len(rows) - 0.5))
        runs = [run for run in row["runs"] if run["chunks"]]
        sessions = [run["sessions"] for run in runs]
        label = f"{row['shape']}, {row['chunk_ms']} ms: {row['held']} held"
        axis.plot(sessions, [run["p99_ms"] for run in runs], "o-", color=colour, label=label)
        axis.plot(sessions, [run["p50_ms"] for run in runs], "o:", color=colour, markersize=3)
        axis.axhline(row["chunk_ms"], color=colour, linewidth=0.6, linestyle="dashed")
    axis.set_yscale("log")
    axis.set_xlabel("sessions in real time")
    axis.set_ylabel("latency in ms: p99, dotted p50")
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def plot_duplex(path: Path) -> Path:
    """Milliseconds a frame by batch size over the floor, and latency against the number of sessions."""
    numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
    pyplot.rcParams.update({"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none"})
    figure, (frame, capacity) = pyplot.subplots(1, 2, figsize=(12.8, 4.6), layout="constrained")
    names = list(dict.fromkeys(row["name"] for row in (*numbers["frame"], *numbers["capacity"])))
    shades: dict[str, Any] = {
        name: pyplot.get_cmap("viridis")(index / max(1, len(names))) for index, name in enumerate(names)
    }
    shades["moshi"] = COLOURS["nemo_toolkit"]
    for rows, key, style in ((numbers["frame"], "ms", "o-"), (numbers["floors"], "floor_ms", "k:")):
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [(row["sessions"], row[key]) for row in rows if row["name"] == name]
            label = f"floor, {name}" if key == "floor_ms" else name
            colour = {} if key == "floor_ms" else {"color": shades[name]}
            frame.plot(*zip(*points, strict=True), style, label=label, **colour)
    frame.set_xlabel("sessions in a batch, all as old as the window")
    frame.set_ylabel("ms a frame")
    for row in numbers["capacity"]:
        runs = sorted((run for run in row["runs"] if run["chunks"]), key=lambda run: run["sessions"])
        for key, style, label in (("p99_ms", "o-", f"{row['name']}: {row['held']} held"), ("p50_ms", "o:", None)):
            points = [(run["sessions"], run[key]) for run in runs]
            if points:
                capacity.plot(*zip(*points, strict=True), style, color=shades[row["name"]], label=label)
    capacity.set_xlabel("sessions in real time")
    capacity.set_ylabel("latency in ms: p99, dotted p50")
    for axis in (frame, capacity):
        axis.axhline(80, color=GREY, linewidth=0.6, linestyle="dashed")
        axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines[1:]:
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Full-duplex dialogue, shape {numbers['shape']}, on {numbers['device']}")
    target = path.with_suffix(".svg")
    figure.savefig(target)
    pyplot.close(figure)
    return target


def plot_transport_loss(path: Path) -> Path:
    """Share of the timeline and delay by loss, and the delay around one lost packet, beside stock aiortc."""
    numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
    pyplot.rcParams.update({"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none"})
    figure, (shares, delays, course) = pyplot.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    for name, label in {"antiphon": "Antiphon", "aiortc": "aiortc"}.items():
        for jitter, style in ((0, "o-"), (60, "s:")):
            rows = [row for row in numbers["rows"] if row["path"] == name and row["jitter_ms"] == jitter]
            losses = [100 * row["loss"] for row in rows]
            jittery = f", 0-{jitter} ms jitter" if jitter else ""
            for axis, key, scale in ((shares, "covered", 100), (delays, "delay_ms_p50", 1)):
                heights = [scale * row[key] for row in rows]
                axis.plot(losses, heights, style, color=COLOURS[name], label=label + jittery)
            if name == "antiphon" and not jitter:
                decoded = [100 * row["from_packets"] for row in rows]
                shares.plot(losses, decoded, "--", color=COLOURS[name], label=f"{label}, not concealed")
        times = numbers["recovery"][name]["packet"]["course"]
        course.plot(*zip(*times, strict=True), "o-", markersize=3, color=COLOURS[name])
    shares.set_ylabel("% of the timeline handed out")
    delays.set_ylabel("median delay, ms above the network's")
    for axis in (shares, delays):
        axis.set_xlabel("% of packets lost")
    course.axvline(8.0, color=GREY, linestyle="dotted")
    course.set_xlabel("seconds (dotted: one packet lost)")
    course.set_ylabel("delay, ms above the network's")
    for axis in (shares, delays, course):
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    shares.legend(frameon=False, fontsize=8, loc="lower left")
    figure.suptitle("Speech over WebRTC under loss: the same packets through both receive paths")
    target = path.with_suffix(".svg")
    figure.savefig(target)
    pyplot.close(figure)
    return target


def plot_transport_peers(path: Path) -> Path:
    """What the time from mouth to ear is made of, and frames delivered and lateness by the number of peers."""
    numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
    pyplot.rcParams.update({"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none"})
    figure, (ear, frames, late) = pyplot.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    promised = numbers["verdict"]["mouth_to_ear_ms"]["at_most"]
    _parts(ear, numbers["mouth_to_ear"], promised)
    for name, label in TRANSPORTS.items():
        rows = [row for row in numbers["rows"] if row["path"] == name]
        for axis, key in ((frames, "frames_a_second"), (late, "late_ms_p99")):
            axis.plot(
                [row["peers"] for row in rows], [row[key] for row in rows], "o-", color=COLOURS[name], label=label
            )
    frames.axhline(50, color=GREY, linestyle="dotted")
    frames.set_ylabel("frames with sound a second, mean peer")
    late.axhline(20, color=GREY, linestyle="dotted")
    late.set_yscale("log")
    late.set_ylabel("lateness of the event loop, ms, p99")
    for axis in (frames, late):
        axis.set_xlabel("peers at 50 frames a second each way, one core")
    frames.set_ylim(bottom=0)
    frames.legend(frameon=False, fontsize=8, loc="lower left")
    for axis in (ear, frames, late):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("An echo over WebRTC on loopback")
    target = path.with_suffix(".svg")
    figure.savefig(target)
    pyplot.close(figure)
    return target


def _parts(axis: Axes, arms: dict[str, Any], promised: float) -> None:
    """A bar for each path, of the parts that its time is made of, and a point for each chirp."""
    names = [name for name in TRANSPORTS if name in arms]
    lefts = [0.0] * len(names)
    for shade, (part, label) in enumerate(PARTS.items()):
        widths = [arms[name]["parts_ms"][part] for name in names]
        colour = pyplot.get_cmap("viridis")(0.15 + 0.25 * shade)
        axis.barh(range(len(names)), widths, 0.5, lefts, label=label, color=colour)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, name in enumerate(names):
        lags = [lag for call in arms[name]["calls"] for lag in call["ms"]]
        axis.plot(lags, [place + 0.36] * len(lags), "|", color="black", markersize=8)
    axis.axvline(promised, color=GREY, linestyle="dotted")
    axis.set_yticks(range(len(names)), [TRANSPORTS[name] for name in names])
    axis.set_ylim(-0.5, len(names))
    axis.set_xlabel("ms from mouth to ear (strokes: each chirp)")
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def plot_speech(path: Path) -> Path:
    """Milliseconds to first audio, alone beside upstream's and by the number of streams."""
    numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
    pyplot.rcParams.update({"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none"})
    figure, (alone, load) = pyplot.subplots(1, 2, figsize=(12.8, 4.6), layout="constrained")
    rows = [(shape["name"], row) for shape in numbers["shapes"] for row in shape["first"]]
    labels = [f"{row['name']}\n{name}" for name, row in rows]
    bars = alone.bar(labels, [row["ms"] for _, row in rows], color=COLOURS["antiphon"])
    alone.bar_label(bars, [f"{row['ms']:.0f} ms" for _, row in rows], fontsize=8, padding=1)
    alone.set_ylabel("median ms from text to first samples, alone")
    for index, shape in enumerate(shape for shape in numbers["shapes"] if "load" in shape):
        colour = pyplot.get_cmap("viridis")(index / 2)
        runs = sorted((run for run in shape["load"]["runs"] if run["utterances"]), key=lambda run: run["sessions"])
        label = f"{shape['name']}: {shape['load']['held']} streams held"
        for key, style, name in (("p99_ms", "o-", label), ("p50_ms", "o:", None)):
            load.plot([run["sessions"] for run in runs], [run[key] for run in runs], style, color=colour, label=name)
        load.axhline(shape["load"]["limit_ms"], color=GREY, linewidth=0.6, linestyle="dashed")
    load.set_yscale("log")
    load.set_xlabel("streams in real time")
    load.set_ylabel("ms to first audio: p99, dotted p50")
    if load.get_legend_handles_labels()[0]:
        load.legend(frameon=False, fontsize=8)
    for axis in (alone, load):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Speech synthesis on {numbers['device']}, {numbers['dtype'].removeprefix('torch.')}")
    target = path.with_suffix(".svg")
    figure.savefig(target)
    pyplot.close(figure)
    return target


def plot_speech_window(path: Path) -> Path:
    """Distance of the mel frames and loss of PLCMOS by window, with what a session then takes."""
    numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
    pyplot.rcParams.update({"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none"})
    memory = numbers["memory"]
    places = range(len(memory))
    labels = [f"{row['seconds']:g} s\n{row['session_mb']:.0f} MB\n{row['published_mb']:.0f} MB" for row in memory]
    judged = "plcmos_change" in numbers["spoken"]["rows"][0]
    figure, axes = pyplot.subplots(
        1, 1 + judged, figsize=(6.6 * (1 + judged), 4.6), squeeze=False, layout="constrained"
    )
    for kind, colour in (("spoken", COLOURS["antiphon"]), ("joined", COLOURS["aiortc"])):
        found = numbers[kind]
        rows = [row for row in found["rows"] if row["seconds"] is not None]
        other = found["rows"][-1]
        label = f"{kind}: passages up to {found['longest_seconds']:.0f} s"
        noise = {"color": colour, "linewidth": 0.6, "linestyle": "dashed", "label": "other noise, nothing forgotten"}
        for key, style, name in (("mel_rms", "o-", label), ("mel_rms_worst_second", "o:", None)):
            axes[0, 0].plot(places, [row[key] for row in rows], style, color=colour, label=name)
        axes[0, 0].axhline(other["mel_rms"], **noise)
        if judged:
            heights, errors = ([row[key] for row in rows] for key in ("plcmos_change", "plcmos_error"))
            axes[0, 1].errorbar(places, heights, errors, fmt="o-", color=colour, capsize=3, label=label)
            axes[0, 1].axhline(other["plcmos_change"], **noise)
    axes[0, 0].set_ylabel("rms distance of mel frames (dotted: worst second)")
    axes[0, 0].set_ylim(bottom=0)
    for axis in axes[0]:
        axis.set_xticks(places, labels, fontsize=8)
        axis.set_xlabel("window; what a session then takes: this voice, CosyVoice2-0.5B")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    if judged:
        axes[0, 1].set_ylabel("change of PLCMOS, with its standard error")
    figure.suptitle("What the flow forgets: the same tokens and noise, with rolling windows")
    target = path.with_suffix(".svg")
    figure.savefig(target)
    pyplot.close(figure)
    return target
