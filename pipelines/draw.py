"""Pictures of graphs and sessions: Mermaid, and SVG laid out here, with no dependency.

The layout is Sugiyama's in small: layers by longest path, long edges bent around nodes through empty places in the
layers between, places ordered by the mean of their neighbours', feedback edges led back below. An edge's label goes to
the spot along it that covers least of stages and other labels.
Colours follow the reader's light or dark preference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, TypeAlias

from .edge import EdgeStats, Link
from .graph import Connection, Graph, Port, did_you_mean

if TYPE_CHECKING:
    from .session import Session
    from .stage import Stage
    from .trace import Span, Trace

_GAP_X, _GAP_Y, _MARGIN, _HEIGHT, _CHAR = 70, 34, 24, 46, 7.4

_SHARES = sorted((n / 20 for n in range(3, 18)), key=lambda share: abs(share - 0.5))  # of a stretch: spots for a label

_STYLE = """
text{font:13px ui-sans-serif,system-ui,"Segoe UI","DejaVu Sans",sans-serif;fill:#1f2933}
.small{font-size:11px;fill:#64748b}.port{stroke:#ffffff;stroke-width:4;paint-order:stroke}
.page{fill:#ffffff}.box{fill:#f8fafc;stroke:#94a3b8;stroke-width:1.2}.source{fill:#eef6ff;stroke:#5b9bd5}
.sink{fill:#f0faf3;stroke:#58a978}.edge{fill:none;stroke:#64748b;stroke-width:1.5}.tip{fill:#64748b}
.back{stroke-dasharray:5 4}.pill{fill:#ffffff;stroke:#cbd5e1}.room{fill:#e2e8f0}
.calm{fill:#4c9f70}.busy{fill:#e0a030}.full{fill:#d9534f}.drops{font-size:11px;fill:#c2372f}
.lane{stroke:#e2e8f0}.tick{stroke:#eef2f6}.cut{stroke:#d9534f;stroke-width:1.5;stroke-dasharray:4 3}
.e0{fill:#3f7fbf}.e1{fill:#d08a2e}.e2{fill:#4c9f70}.e3{fill:#9467bd}
@media (prefers-color-scheme:dark){
text{fill:#e5e9f0}.small{fill:#94a3b8}.port{stroke:#11151c}.page{fill:#11151c}.box{fill:#1b222d;stroke:#64748b}
.source{fill:#172637;stroke:#5b9bd5}.sink{fill:#16281d;stroke:#58a978}.edge{stroke:#94a3b8}.tip{fill:#94a3b8}
.pill{fill:#11151c;stroke:#475569}.room{fill:#334155}.drops{fill:#f0837c}.lane{stroke:#273142}.tick{stroke:#1c2431}
}
""".strip()


def draw(graph: Graph, form: str = "svg", session: Session | None = None) -> str:
    """The graph as ``svg`` or ``mermaid`` text, with the edges' live depths and drops when a session is given."""
    if form == "mermaid":
        return _mermaid(graph, session)
    if form == "svg":
        return _Layout(graph, session).svg()
    raise ValueError(f"no such form of picture: {form!r}{did_you_mean(form, ['svg', 'mermaid'])}")


def _mermaid(graph: Graph, session: Session | None) -> str:
    ids = {node: f"s{i}" for i, node in enumerate(graph.nodes)}
    lines = ["flowchart LR"]
    for node, its in ids.items():
        left, right = ("([", "])") if not node.inputs else ("[[", "]]") if not node.outputs else ("[", "]")
        lines.append(f'    {its}{left}"{_entities(graph.names[node])}"{right}')
    for c in graph.connections:
        arrow = "-.->" if c.link.feedback else "-->"
        parts = [_ports(c), _state(c.link, _stats(session, c))]
        label = _entities(", ".join(part for part in parts if part))
        lines.append(f"    {ids[c.source.stage]} {arrow}{_quoted(label)} {ids[c.target.stage]}")
    for i, port in enumerate(graph.open_outputs):
        label = _entities(_state(Link(), _stats(session, port)))
        out = f'out{i}(("{_entities(port.name)}"))'
        lines.append(f"    {ids[port.stage]} -->{_quoted(label)} {out}")
    return "\n".join(lines) + "\n"


def _quoted(label: str) -> str:
    return f'|"{label}"|' if label else ""


def _entities(text: str) -> str:
    """Text inside a quoted Mermaid label."""
    return text.replace("&", "#amp;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")


def _stats(session: Session | None, key: Connection | Port) -> EdgeStats | None:
    if session is None:
        return None
    if isinstance(key, Connection):
        edge = session.edges.get(key)
        return edge.stats() if edge is not None else None
    for port, edge in session.edges.items():
        if isinstance(port, Port) and (port.stage, port.name) == (key.stage, key.name):
            return edge.stats()
    return None


def _ports(c: Connection) -> str:
    """The names of the ports where a stage has several."""
    source = c.source.name if len(c.source.stage.outputs) > 1 else ""
    target = c.target.name if len(c.target.stage.inputs) > 1 else ""
    return source if source == target else " \u2192 ".join(name for name in (source, target) if name)


def _state(link: Link, stats: EdgeStats | None) -> str:
    """Depth, bound and drops of a live edge; otherwise what its link says that is not the default."""
    if stats is not None:
        drops = f", \u2212{stats.dropped}" if stats.dropped else ""
        return f"{stats.depth}/{link.items}, {stats.media_ms:.0f} ms{drops}"
    usual = Link()
    parts = [f"\u2264 {link.items}"] if link.items != usual.items else []
    parts += [f"\u2264 {link.ms:g} ms"] if link.ms != usual.ms else []
    parts += [link.policy.replace("_", " ")] if link.policy != usual.policy else []
    return ", ".join(parts)


_Area: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(eq=False)
class _Place:
    """A node, or the bend of an edge that passes through a layer. ``x``, ``y`` is its left middle."""

    label: str = ""
    small: str = ""
    look: str = ""
    layer: int = 0
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0
    before: list[_Place] = field(default_factory=list)
    after: list[_Place] = field(default_factory=list)


class _Layout:
    """Places of nodes and the ways of edges."""

    def __init__(self, graph: Graph, session: Session | None) -> None:
        self.graph, self.session = graph, session
        self.places: dict[Stage, _Place] = {node: self._place(node) for node in graph.nodes}
        self._rank()
        self.ways: list[tuple[Connection | Port, list[_Place]]] = []
        self.layers: list[list[_Place]] = []
        for place in self.places.values():
            self._into_layer(place)
        for c in graph.connections:
            if not c.link.feedback:
                self.ways.append((c, self._way(self.places[c.source.stage], self.places[c.target.stage])))
        for port in graph.open_outputs:
            source = self.places[port.stage]
            out = _Place(small=port.name, look="out", layer=source.layer + 1, width=10, height=10)
            self._into_layer(out)
            self.ways.append((port, self._way(source, out)))
        self._order()
        self._position()

    def _place(self, node: Stage) -> _Place:
        name = self.graph.names[node]
        look = "box source" if not node.inputs else "box sink" if not node.outputs else "box"
        kind = type(node).__name__.lower()
        small = "lasting" if node.lasting and node.inputs else ""
        if kind.replace("_", "") not in name.lower().replace("_", "").replace("-", ""):
            small = ", ".join(part for part in (kind, small) if part)
        width = max(84.0, 28 + max(len(name) * _CHAR, len(small) * 6.2))
        return _Place(name, small, look, width=width, height=_HEIGHT)

    def _rank(self) -> None:
        """Each node one layer after the last of what feeds it."""
        for _ in self.graph.nodes:
            for c in self.graph.connections:
                source, target = self.places[c.source.stage], self.places[c.target.stage]
                if not c.link.feedback:
                    target.layer = min(max(target.layer, source.layer + 1), len(self.places))

    def _into_layer(self, place: _Place) -> None:
        while len(self.layers) <= place.layer:
            self.layers.append([])
        self.layers[place.layer].append(place)

    def _way(self, source: _Place, target: _Place) -> list[_Place]:
        way = [source]
        for layer in range(source.layer + 1, target.layer):
            bend = _Place(layer=layer, height=8)
            self._into_layer(bend)
            way.append(bend)
        way.append(target)
        for here, following in pairwise(way):
            here.after.append(following)
            following.before.append(here)
        return way

    def _order(self) -> None:
        for sweep in range(6):
            forward = sweep % 2 == 0
            for layer in self.layers[1:] if forward else reversed(self.layers[:-1]):
                index = {place: i for row in self.layers for i, place in enumerate(row)}

                def mean(place: _Place, index: dict[_Place, int] = index, forward: bool = forward) -> float:
                    near = place.before if forward else place.after
                    return sum(index[one] for one in near) / len(near) if near else index[place]

                layer.sort(key=mean)

    def _position(self) -> None:
        x = float(_MARGIN)
        for number, layer in enumerate(self.layers):
            width = max((place.width for place in layer), default=0.0)
            for place in layer:
                place.x = x + (width - place.width) / 2 if place.look != "out" else x
            labels = [self._label_width(key) for key, way in self.ways for one in way[:-1] if one.layer == number]
            x += width + max([_GAP_X, *(wide + 44 for wide in labels)])
        self.width = x
        for layer in self.layers:
            self._spread(layer, [0.0] * len(layer))
        for sweep in range(8):
            for layer in self.layers if sweep % 2 == 0 else reversed(self.layers):
                wanted = []
                for place in layer:
                    near = place.before if sweep % 2 == 0 else place.after
                    near = near or place.before or place.after
                    wanted.append(sum(one.y for one in near) / len(near) if near else place.y)
                self._spread(layer, wanted)
        places = [place for layer in self.layers for place in layer]
        top = min((place.y - place.height / 2 for place in places), default=0.0)
        for place in places:
            place.y += _MARGIN + 8 - top
        self.bottom = max((place.y + place.height / 2 for place in places), default=0.0)

    @staticmethod
    def _spread(layer: Sequence[_Place], wanted: Sequence[float]) -> None:
        """Put a layer's places as near as they can be to where they want to be, in their order and apart."""
        floor = float("-inf")
        for place, y in zip(layer, wanted, strict=True):
            place.y = max(y, floor + place.height / 2)
            floor = place.y + place.height / 2 + _GAP_Y
        shift = sum(y - place.y for place, y in zip(layer, wanted, strict=True)) / max(len(layer), 1)
        for place in layer:
            place.y += shift

    def _label_width(self, key: Connection | Port) -> float:
        text, ports = self._texts(key)
        return max(len(text), len(ports)) * 6.4 + (16 if text else 0)

    def svg(self) -> str:
        """The picture."""
        back = [c for c in self.graph.connections if c.link.feedback]
        height = self.bottom + _MARGIN + (46 * len(back) + 18 if back else 0)
        parts: list[str] = []
        labels: list[str] = []
        taken = [_bounds(place) for layer in self.layers for place in layer if place.look]
        for key, way in sorted(self.ways, key=lambda one: -len(one[1])):  # long ones have places of their own
            path, spots = self._curve(way)
            parts.append(f'<path class="edge" d="{path}"/>{_tip(way[-1].x, way[-1].y)}')
            areas = [self._areas(key, x, y) for x, y in spots]
            costs = [sum(_overlap(one, other) for one in area for other in taken) for area in areas]
            best = costs.index(min(costs))
            taken += areas[best]
            labels.append(self._label(key, *spots[best]))
        for i, c in enumerate(back):
            source, target = self.places[c.source.stage], self.places[c.target.stage]
            y = self.bottom + 36 + 46 * i
            out, into = source.x + source.width * 0.8, target.x + target.width * 0.2
            path = (
                f"M{out:.1f} {source.y + source.height / 2:.1f}V{y - 10:.1f}Q{out:.1f} {y:.1f} {out - 10:.1f} {y:.1f}"
                f"H{into + 10:.1f}Q{into:.1f} {y:.1f} {into:.1f} {y - 10:.1f}V{target.y + target.height / 2 + 7:.1f}"
            )
            parts.append(f'<path class="edge back" d="{path}"/>{_tip(into, target.y + target.height / 2, up=True)}')
            labels.append(self._label(c, (out + into) / 2, y, below=True))
        for layer in self.layers:
            parts.extend(_box(place) for place in layer if place.look)
        return _page(max(self.width - _GAP_X + _MARGIN + 30, 120), height, "\n".join(parts + labels))

    def _curve(self, way: list[_Place]) -> tuple[str, list[tuple[float, float]]]:
        """The path through a way's places, and spots along it for its label, the best looking first."""
        x, y = way[0].x + way[0].width, way[0].y
        path = f"M{x:.1f} {y:.1f}"
        flat: list[tuple[float, float]] = []
        bent: list[tuple[float, float]] = []
        for place in way[1:]:
            end = place.x - (6 if place is way[-1] else 0)
            half = (x + end) / 2
            path += f"C{half:.1f} {y:.1f} {half:.1f} {place.y:.1f} {end:.1f} {place.y:.1f}"
            bent += [_on_curve(share, (x, y), half, (end, place.y)) for share in _SHARES]
            x, y = place.x + place.width, place.y
            if not place.look and place.width == 0:
                widest = max(one.width for one in self.layers[place.layer])
                path += f"H{x + widest:.1f}"
                flat.append((x + widest / 2, y))
                x += widest
        return path, flat + bent

    def _areas(self, key: Connection | Port, x: float, y: float) -> list[_Area]:
        """What an edge's label covers at a spot: the names of its ports, and below them its state."""
        text, ports = self._texts(key)
        wide, name = (len(text) * 6.1 + 18) / 2, (len(ports) * 6.2 + 4) / 2
        areas = [(x - name, y - 27, x + name, y - 12)] if ports else []
        return areas + ([(x - wide, y - 12, x + wide, y + 12)] if text else [])

    def _texts(self, key: Connection | Port) -> tuple[str, str]:
        """The state of an edge, and the names of its ports."""
        link = key.link if isinstance(key, Connection) else Link()
        return _state(link, _stats(self.session, key)), _ports(key) if isinstance(key, Connection) else ""

    def _label(self, key: Connection | Port, x: float, y: float, *, below: bool = False) -> str:
        link = key.link if isinstance(key, Connection) else Link()
        stats = _stats(self.session, key)
        text, ports = self._texts(key)
        parts = []
        if ports:
            base = y + 26 if below and text else y - 16
            parts.append(
                f'<text class="small port" x="{x:.1f}" y="{base:.1f}" text-anchor="middle">{escape(ports)}</text>'
            )
        if text:
            width = len(text) * 6.1 + 14
            left, high = x - width / 2, 24 if stats is not None else 18
            tip = "" if stats is None else _tooltip(stats, link)
            kind = "drops" if stats is not None and stats.dropped else "small"
            parts.append(
                f'<g>{tip}<rect class="pill" x="{left:.1f}" y="{y - high / 2:.1f}" width="{width:.1f}" height="{high}" '
                f'rx="8"/><text class="{kind}" x="{x:.1f}" y="{y + (1 if stats else 4):.1f}" text-anchor="middle">'
                f"{escape(text)}</text>{_gauge(stats, link, left + 7, y + 5, width - 14) if stats else ''}</g>"
            )
        return "".join(parts)


def _on_curve(share: float, start: tuple[float, float], half: float, end: tuple[float, float]) -> tuple[float, float]:
    """A point of an edge's Bezier curve, whose control points are at ``half`` between its ends."""
    rest = 1 - share
    bend = 3 * rest * share
    x = rest**3 * start[0] + bend * half + share**3 * end[0]
    return x, (rest**3 + bend * rest) * start[1] + (bend * share + share**3) * end[1]


def _bounds(place: _Place) -> _Area:
    """What is drawn of a place, with a little room around it."""
    width = 15 + len(place.small) * 6.2 if place.look == "out" else place.width
    half = place.height / 2 + 3
    return (place.x - 8, place.y - half, place.x + width + 4, place.y + half)


def _overlap(a: _Area, b: _Area) -> float:
    """The area that two rectangles share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _tip(x: float, y: float, *, up: bool = False) -> str:
    points = ((x, y), (x - 4, y + 8), (x + 4, y + 8)) if up else ((x, y), (x - 8, y - 4), (x - 8, y + 4))
    return f'<polygon class="tip" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>'


def _box(place: _Place) -> str:
    x, y, middle = place.x, place.y - place.height / 2, place.x + place.width / 2
    if place.look == "out":
        return f'<circle class="tip" cx="{x + 5:.1f}" cy="{place.y:.1f}" r="5"/>' + (
            f'<text class="small" x="{x + 15:.1f}" y="{place.y + 4:.1f}">{escape(place.small)}</text>'
        )
    lines = f'<text x="{middle:.1f}" y="{place.y + (-2 if place.small else 4.5):.1f}" text-anchor="middle">'
    lines += f"{escape(place.label)}</text>"
    if place.small:
        lines += f'<text class="small" x="{middle:.1f}" y="{place.y + 14:.1f}" text-anchor="middle">'
        lines += f"{escape(place.small)}</text>"
    size = f'width="{place.width:.1f}" height="{place.height:.1f}"'
    return f'<rect class="{place.look}" x="{x:.1f}" y="{y:.1f}" {size} rx="9"/>{lines}'


def _gauge(stats: EdgeStats, link: Link, x: float, y: float, width: float) -> str:
    """How full the edge is: the larger of its two bounds."""
    share = min(max(stats.depth / link.items, stats.media_ms / link.ms), 1.0)
    look = "calm" if share < 0.5 else "busy" if share < 0.9 else "full"
    room = f'<rect class="room" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="3" rx="1.5"/>'
    return room + f'<rect class="{look}" x="{x:.1f}" y="{y:.1f}" width="{width * share:.1f}" height="3" rx="1.5"/>'


def _tooltip(stats: EdgeStats, link: Link) -> str:
    return (
        f"<title>depth {stats.depth} of {link.items} (most {stats.depth_max}), media {stats.media_ms:.0f} of "
        f"{link.ms:g} ms (most {stats.media_ms_max:.0f}), late {stats.late_ms:.0f} ms (most {stats.late_ms_max:.0f}), "
        f"passed {stats.passed}, dropped: {stats.dropped_policy} by policy {link.policy}, {stats.dropped_stale} stale, "
        f"{stats.dropped_unread} unread</title>"
    )


def _page(width: float, height: float, body: str) -> str:
    width, height = ceil(width), ceil(height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f'<style>{_STYLE}</style>\n<rect class="page" width="{width}" height="{height}" rx="10"/>\n{body}\n</svg>\n'
    )


def draw_timeline(trace: Trace, width: float = 960.0) -> str:
    """A trace as SVG: a lane a stage, a bar from taking a chunk to emitting what came of it, lines at interruptions."""
    spans = trace.spans
    lanes = list(dict.fromkeys(span.stage for span in sorted(spans, key=lambda span: span.start / span.rate)))
    left = _MARGIN + 12 + max((len(name) for name in lanes), default=0) * _CHAR
    right, row = 150.0, 34.0
    begin = min((span.taken for span in spans), default=0.0)
    end = max((span.emitted for span in spans), default=1.0)
    scale = (width - left - right) / max(end - begin, 1e-6)
    bottom = _MARGIN + row * len(lanes)

    def at(seconds: float) -> float:
        return left + (seconds - begin) * scale

    parts = []
    step = next((s for s in (10.0**e * m for e in range(-4, 6) for m in (1, 2, 5)) if (end - begin) / s <= 9), 1e6)
    for i in range(int((end - begin) / step) + 1):
        x = at(begin + i * step)
        parts.append(f'<line class="tick" x1="{x:.1f}" y1="{_MARGIN}" x2="{x:.1f}" y2="{bottom:.1f}"/>')
        label = f"{i * step:.4g} s"
        parts.append(f'<text class="small" x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{label}</text>')
    for number, name in enumerate(lanes):
        mine = [span for span in spans if span.stage == name]
        y = _MARGIN + row * (number + 0.5)
        parts.append(f'<line class="lane" x1="{left:.1f}" y1="{y:.1f}" x2="{width - right + 8:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 10:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        parts.extend(_bar(span, at(span.taken), at(span.emitted), y) for span in mine)
        parts.append(f'<text class="small" x="{width - right + 16:.1f}" y="{y + 4:.1f}">{_latency(mine)}</text>')
    for mark in trace.marks:
        if begin <= mark.at <= end:
            x = at(mark.at)
            parts.append(
                f'<g><title>interruption: epoch {mark.epoch}</title><line class="cut" x1="{x:.1f}" y1="{_MARGIN - 8}" '
                f'x2="{x:.1f}" y2="{bottom:.1f}"/></g>'
            )
    return _page(width, bottom + 30, "\n".join(parts))


def _bar(span: Span, begin: float, end: float, y: float) -> str:
    start, seconds = span.start / span.rate, span.nanoseconds * 1e-9
    title = f"{span.kind} {span.seq}, epoch {span.epoch}, media {start:.3f} s + {seconds * 1e3:.0f} ms"
    wide, high = max(end - begin, 2.0), 14 if end - begin > 2 else 20
    return (
        f'<rect class="e{span.epoch % 4}" x="{begin:.1f}" y="{y - high / 2:.1f}" width="{wide:.1f}" height="{high}" '
        f'rx="1.5" opacity="0.75"><title>{title}, took {span.latency * 1e3:.1f} ms</title></rect>'
    )


def _latency(spans: list[Span]) -> str:
    took = sorted(span.latency for span in spans)
    if not took or took[-1] == 0:
        return f"{len(took)} chunks"
    return f"p50 {took[len(took) // 2] * 1e3:.3g} ms, p99 {took[int(len(took) * 0.99)] * 1e3:.3g} ms"
