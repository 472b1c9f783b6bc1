"""The demo's comparisons, as graphs: what each row is judged against, and what is told of it. No ComfyUI runs."""

import pytest

from authoring.templates.parts import MOCHI, MOCHI_SEPIA, ROBO, ROBO_SEPIA, SEPIA
from demo import graphs
from demo.run import error_table
from demo.scenes import CAT, LORAS, ROBOT, ROWS
from demo.scenes import SEPIA as STYLE

SEEDS = (1, 2)
MERGED = {graphs.MERGE: "merged.safetensors", graphs.POLISHED: "polished.safetensors"}


def loaded(graph: graphs.Graph, node: str) -> list[tuple[str, float]]:
    """(LoRA, strength) of every loader on the way from the base to `node`."""
    found = []
    while node != "base":
        inputs = graph[node]["inputs"]
        found.append((inputs["lora_name"], inputs["strength_model"]))
        node = inputs["model"][0]
    return found[::-1]


@pytest.fixture
def measurement() -> tuple[graphs.Graph, dict[str, tuple[str, str]]]:
    return graphs.measurement(ROWS, SEEDS, MERGED)


def test_the_demo_asks_for_each_lora_by_itself_and_for_both_characters_in_the_style():
    asked = {row.loras for row in ROWS}
    assert asked == {(CAT,), (ROBOT,), (STYLE,), (CAT, STYLE), (ROBOT, STYLE)}
    drawn = [row for row in ROWS if row.is_drawn]
    assert {row.loras for row in drawn} == asked
    assert all("sepia style" in row.prompt for row in ROWS if STYLE in row.loras)


def test_every_row_is_judged_against_the_loras_it_asks_for_stacked_as_load_lora_does(measurement):
    graph, measured = measurement
    asked = {row.asked: row.loras for row in ROWS}
    for node, (what, column) in measured.items():
        inputs = graph[node]["inputs"]
        assert loaded(graph, inputs["reference"][0]) == [(lora, 1.0) for lora in asked[what]]
        stacks = {"plain stack": 1.0, "stack at 0.7": 0.7}
        wanted = {name: [(lora, strength) for lora in LORAS] for name, strength in stacks.items()}
        wanted |= {"base": [], **{name: [(file, 1.0)] for name, file in MERGED.items()}}
        assert loaded(graph, inputs["model"][0]) == wanted[column]
        assert inputs["reference"] != inputs["model"]


def test_every_row_is_measured_with_every_seed_in_every_column_but_that_of_the_reference(measurement):
    assert len(measurement[1]) == len(ROWS) * len(SEEDS) * (len(graphs.COLUMNS) - 1)


def test_the_picture_shows_the_loras_asked_for_beside_the_rest():
    graph, places = graphs.comparison(ROWS, MERGED)
    assert set(places.values()) == {(row, column) for row in range(len(ROWS)) for column in range(len(graphs.COLUMNS))}
    at = graphs.COLUMNS.index(graphs.REFERENCE)
    for number, row in enumerate(ROWS):
        model = graph[f"sample {number} {at}"]["inputs"]["model"][0]
        assert [lora for lora, _ in loaded(graph, model)] == list(row.loras)


def test_the_table_has_a_line_for_each_thing_asked_for_and_keeps_the_mean_of_single_ones_apart():
    figures = {row.asked: 0.1 if len(row.loras) == 1 else 0.4 for row in ROWS}
    found = {(asked, column): figure for asked, figure in figures.items() for column in graphs.COLUMNS}
    lines = error_table(found).splitlines()[2:]
    told = {line[:-75].strip(): line.split()[-1] for line in lines}
    assert told == {
        **{"mochi_cat": "0.100", "robo_robot": "0.100", "sepia_style": "0.100", "mean, one at a time": "0.100"},
        **{"mochi_cat + sepia_style": "0.400", "robo_robot + sepia_style": "0.400", "mean, two at once": "0.400"},
    }


def test_no_character_is_calibrated_in_a_place_where_it_is_judged():
    calibrated = {CAT: (*MOCHI.prompts, *MOCHI_SEPIA.prompts), ROBOT: (*ROBO.prompts, *ROBO_SEPIA.prompts)}
    for row in (row for row in ROWS if row.loras != (STYLE,)):
        place = row.prompt.partition(",")[0].split(" ", 3)[3]
        assert not [prompt for prompt in calibrated[row.loras[0]] if place in prompt]
    assert not {row.prompt for row in ROWS} & set(SEPIA.prompts)
