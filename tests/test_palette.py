"""Colours: the same for the same thing wherever it is shown, and told apart by everyone."""

import itertools
from xml.etree import ElementTree

import numpy as np
import pytest
from test_trace import traced

from taskgpt import palette
from taskgpt.config import load_graph
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import training_graph
from taskgpt.lab.traces import page, timeline
from taskgpt.tasks.picture import draw

# What eyes without one kind of cone see of linear red, green and blue: Machado, Oliveira and Fernandes 2009, severity 1.
EYES = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Linear red, green and blue to cones, and their roots to lightness, green-red and blue-yellow: Ottosson's Oklab.
TO_CONES = [[0.41222147, 0.53633254, 0.05144599], [0.21190350, 0.68069954, 0.10739696], [0.08830246, 0.28171884, 0.62997870]]
TO_LAB = [[0.21045426, 0.79361779, -0.00407205], [1.97799850, -2.42859221, 0.45059371], [0.02590404, 0.78277177, -0.80867577]]


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def seen(colour: str, eyes) -> np.ndarray:
    """Return where it is in Oklab, in which 0.02 is the least difference that people notice between fields side by side."""
    return TO_LAB @ np.cbrt(TO_CONES @ np.clip(eyes @ linear(colour), 0, 1))


def contrast(a: str, b: str) -> float:
    """Return WCAG's ratio of luminances."""
    dark, light = sorted(float(linear(each) @ [0.2126, 0.7152, 0.0722]) for each in (a, b))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("eyes", EYES)
def test_any_two_colours_are_told_apart(eyes):
    """Four times as far from each other as people notice, for all eyes; and so are the shades of one family."""
    sees = np.asarray(EYES[eyes])
    for a, b in itertools.combinations(palette.COLOURS, 2):
        assert np.linalg.norm(seen(a, sees) - seen(b, sees)) > 0.08, (a, b)
    for family in ("matmul", "attention", "layernorm", "encoder", "gelu"):
        directions = ("forward", "backward", "update") if family == "layernorm" else ("forward", "backward")
        shades = palette.of_kernels(f"{family}_{direction}" for direction in directions).values()
        for a, b in itertools.combinations(shades, 2):
            assert np.linalg.norm(seen(a, sees) - seen(b, sees)) > 0.08, (family, a, b)


def test_colours_are_seen_on_white_and_on_black():
    """And what is written on them is read: at WCAG's 4.5 for text."""
    kernels = [f"{family}_{word}" for family in ("matmul", "gelu", "encoder", "lmhead") for word in ("forward", "backward", "update")]
    for colour in (*palette.COLOURS, palette.REST):
        assert contrast(colour, "#ffffff") > 1.4
        assert contrast(colour, "#0d1117") > 2
    for colour in (*palette.COLOURS, *palette.of_kernels(kernels).values(), *palette.of_layers(range(12)).values()):
        assert contrast(colour, palette.ink_on(colour)) >= 4.5, colour


def test_kernels_of_a_family_share_a_hue():
    """Alone or among others; forward is the family's colour, backward a darker one, and all updates are one family."""
    kernels = ["matmul_forward", "matmul_gelu_forward", "matmul_gelu_backward", "matmul_backward_weight", "adamw_update", "linear_update"]
    key = palette.key("kernel", kernels)
    assert [label for label, _ in key.values()] == ["matmul", "matmul", "matmul backward", "matmul backward", "update", "update"]
    assert key["matmul_forward"][1] == palette.BLUE
    assert len({colour for _, colour in key.values()}) == 3
    for kernel in kernels:
        assert palette.key("kernel", [kernel])[kernel] == key[kernel]


def test_names_of_others_keep_their_colours():
    """By the name alone; only names that would share one move, in whatever order they come, and those for which none is left are grey."""
    names = [f"user{n}" for n in range(len(palette.COLOURS) + 2)]
    alone = {name: palette.of_names([name])[name] for name in names}
    few = names[:4]
    assert sorted(palette.of_names(few).items()) == sorted(palette.of_names(few[::-1]).items())
    assert len(set(palette.of_names(few).values())) == len(few)
    assert sum(palette.of_names(few)[name] == alone[name] for name in few) >= len({alone[name] for name in few})
    many = list(palette.of_names(names).values())
    assert many.count(palette.REST) == 2 and set(many) == {*palette.COLOURS, palette.REST}
    mixed = palette.of_names(["matmul", *few])
    assert mixed["matmul"] == palette.BLUE and palette.BLUE not in [mixed[name] for name in few]


def test_layers_go_from_dark_to_light():
    """In their order, also when there is one; none has a colour of its own."""
    found = palette.key("layer", [3, -1, 0, 1, 2])
    assert [label for label, _ in found.values()] == ["layer 0", "layer 1", "layer 2", "layer 3", "no layer"]
    light = [seen(colour, np.eye(3))[0] for label, colour in found.values() if label != "no layer"]
    assert light == sorted(light)
    assert palette.key("layer", [-1, 5]) == {5: ("layer 5", palette.of_layers([5])[5]), -1: ("no layer", palette.REST)}


def test_a_graph_and_its_trace_have_the_same_colours(tmp_path):
    """The picture of the graph, the still timeline, the page."""
    config = load_graph("tiny")
    graph = training_graph(GPT2(config.model, config.batch, config.tiles, config.options))
    of_graph = draw(graph).colours
    assert of_graph == dict(palette.key("kernel", [task.name for task in graph.tasks]).values())
    assert of_graph["matmul"] == palette.BLUE and of_graph["update"] == palette.PINK
    trace = traced("native")
    wanted = {colour for _, colour in palette.key("kernel", trace.names("kernel")).values()}
    picture = ElementTree.fromstring(timeline.to_svg([trace], width=10**6))
    assert {rect.get("fill") for rect in picture.iter("{http://www.w3.org/2000/svg}rect") if len(rect)} == wanted
    page.write([trace], tmp_path / "page.html", "native")
    text = (tmp_path / "page.html").read_text()
    assert all(f'"{colour}"' in text for colour in wanted)
