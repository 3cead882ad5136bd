"""Handles on models of plain PyTorch: grids, layers, errors, copies, and what is left when they go."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import GRID, WHERE, C, N, Own, Stack, masked, near, nothing_is_left, shown_by  # noqa: F401
from torch import Tensor, nn

import chronotope as ct
from chronotope.adapt import Handle, attach
from chronotope.adapt.attach import checked
from chronotope.adapt.tap import _RUNNING, Tap
from chronotope.errors import ChronotopeError


@pytest.mark.parametrize("last", [False, True])
def test_handles_go_in_any_order(last: bool) -> None:
    model, x = Stack(), torch.randn(1, N, C)
    plain = model(x)
    handles = [attach(model, where, grid=GRID) for where in (WHERE, ct.along("h"))]
    with masked(shown_by(WHERE & ct.along("h"))):
        expected = model(x)
    near(model(x), expected)
    handles.pop(-1 if last else 0).remove()
    with masked(shown_by(WHERE if last else ct.along("h"))):
        expected = model(x)
    near(model(x), expected)
    handles[0].remove()
    handles[0].remove()
    assert torch.equal(model(x), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("inner_first", [False, True])
def test_a_model_and_its_part(inner_first: bool) -> None:
    model, x = Stack(), torch.randn(1, N, C)
    subjects = [(model, WHERE), (model.blocks[1], ct.along("h"))]
    with attach(*subjects[inner_first], grid=GRID) as one, attach(*subjects[not inner_first], grid=GRID) as two:
        found, part = model(x), model.blocks[1](x)
    with masked(shown_by(WHERE), shown_by(WHERE & ct.along("h"))):
        near(found, model(x))
    with masked(shown_by(WHERE & ct.along("h"))):
        near(part, model.blocks[1](x))
    assert sorted(len(handle.layers) for handle in (one, two)) == [1, 2]


def test_two_grids_for_the_same_tokens_are_refused() -> None:
    model, x = Stack(), torch.randn(1, N, C)
    told = r"two patterns meet, one on Grid\(h=3, w=4\) and one on Grid\(h=4"
    one, two = attach(model, WHERE, grid=GRID), attach(model, WHERE, grid=ct.Grid(h=4, w=3))
    with one, two, pytest.raises(ChronotopeError, match=told):
        model(x)
    with attach(model, WHERE, grid=GRID), attach(model, ct.along("h")) as handle:
        model(x)  # which the other has said
    assert handle.layers[0].done == "along('h') on Grid(h=3, w=4)"
    layer = ct.nn.Attention(C, 2)
    with attach(layer, WHERE, grid=ct.Grid(h=4, w=3)), pytest.raises(ChronotopeError, match="two patterns meet"):
        layer(x, GRID)


def test_errors_leave_nothing_behind() -> None:
    """Wherever they come from: the model, its hooks, the grid, the pattern, in the outer model or in its part."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no")

    def met(*causes: Callable[[Stack], Any]) -> None:
        model, x = Stack(), torch.randn(1, N, C)
        plain = model(x)
        for cause in causes:
            undo = cause(model)
            with pytest.raises((RuntimeError, ChronotopeError)):
                model(x)
            assert not _RUNNING.frames and _RUNNING.mode is None and not _RUNNING.busy
            undo.remove()
        assert torch.equal(model(x), plain)

    where = {"grid": GRID}
    both = lambda make: lambda model: Both(attach(model, WHERE, **where), make(model))  # noqa: E731
    met(
        lambda model: attach(model, WHERE, grid=fails),
        lambda model: attach(model, fails, **where),
        lambda model: attach(model, ct.window(z=3), **where),
        lambda model: attach(model, WHERE, grid=ct.Grid(h=3, w=5)),
        both(lambda model: attach(model.blocks[0], WHERE, grid=fails)),
        both(lambda model: model.blocks[1].register_forward_pre_hook(fails)),
        both(lambda model: model.blocks[1].register_forward_hook(fails)),
        both(lambda model: model.blocks[1].qkv.register_forward_hook(fails)),
        both(lambda model: model.register_forward_hook(fails)),
        both(lambda model: model.register_forward_pre_hook(fails, prepend=True)),
    )


class Both:
    """Two handles as one."""

    def __init__(self, *handles: Any):
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def test_an_interrupt_leaves_nothing_once_the_handle_is_removed() -> None:
    model, x = Stack(), torch.randn(1, N, C)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    stopper = model.blocks[1].qkv.register_forward_pre_hook(stop)
    handle = attach(model, WHERE, grid=GRID)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    stopper.remove()
    with masked(shown_by(WHERE)):
        expected = model(x)
    handle.remove()
    assert not _RUNNING.frames and _RUNNING.mode is None
    with attach(model, WHERE, grid=GRID):
        near(model(x), expected)


def test_a_handle_may_be_removed_while_its_model_runs() -> None:
    model, x = Stack(), torch.randn(1, N, C)
    handle = attach(model, WHERE, grid=GRID)
    hook = model.blocks[0].register_forward_hook(lambda *args: handle.remove())
    found = model(x)
    hook.remove()
    with masked(shown_by(WHERE), shown_by(ct.full())):
        near(found, model(x))


def test_threads_do_not_meet() -> None:
    models, x = [Stack(4) for _ in range(2)], torch.randn(1, N, C)
    wheres = [WHERE, ct.along("h")]
    expected = []
    for model, where in zip(models, wheres, strict=True):
        with masked(shown_by(where)):
            expected.append(model(x))
    wrong: list[float] = []
    gate = threading.Barrier(2)

    def work(index: int) -> None:
        gate.wait()
        for _ in range(15):
            with attach(models[index], wheres[index], grid=GRID):
                wrong.append(float((models[index](x) - expected[index]).detach().abs().max()))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 30 and max(wrong) < 1e-5


def test_one_model_in_two_threads_on_two_grids() -> None:
    model, wide = Stack(3), ct.Grid(h=4, w=3)
    inputs, grids = torch.randn(2, 1, N, C), [GRID, wide]
    expected = []
    for x, grid in zip(inputs, grids, strict=True):
        with masked(shown_by(WHERE, grid)):
            expected.append(model(x))
    wrong: list[float] = []
    gate = threading.Barrier(2)

    def work(index: int) -> None:
        gate.wait()
        for _ in range(25):
            wrong.append(float((model(inputs[index]) - expected[index]).detach().abs().max()))

    with attach(model, WHERE, grid=lambda x: grids[int(not torch.equal(x, inputs[0]))]):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(wrong) == 50 and max(wrong) < 1e-5


def test_layers_are_chosen_by_name_glob_or_function() -> None:
    model, x = Stack(3), torch.randn(1, N, C)
    for layers, expected in (
        ("blocks.1", [1]), ("*.2", [2]), (["*.0", "blocks.2"], [0, 2]), (lambda name: name.endswith("1"), [1]),
        (None, [0, 1, 2]),
    ):  # fmt: skip
        with attach(model, WHERE, grid=GRID, layers=layers) as handle:
            found = model(x)
        assert [number for number, layer in enumerate(handle.layers) if layer.done] == expected
        with masked(*(shown_by(WHERE if number in expected else ct.full()) for number in range(3))):
            near(found, model(x))
    with pytest.raises(ChronotopeError, match=r"'blocks.7' names no attention layer; there are: blocks.0, blocks.1"):
        attach(model, WHERE, grid=GRID, layers=["blocks.0", "blocks.7"])


def test_a_pattern_for_each_layer_or_head() -> None:
    model, x = Stack(2), torch.randn(1, N, C)
    plain = model(x)
    patterns = {"blocks.0": WHERE, "blocks.1": ct.along("h")}
    with masked(*map(shown_by, patterns.values())):
        expected = model(x)
    for where in (patterns, patterns.get):
        with attach(model, where, grid=GRID):
            near(model(x), expected)
    with attach(model, {"blocks.0": ct.full()}, grid=GRID) as handle:
        near(model(x), plain)
    assert handle.layers[1].why == "no pattern was named for it"
    each = ct.per_head([WHERE, ct.along("h")])
    with attach(model, each, grid=GRID), torch.no_grad():
        found = model(x)
    with masked(ct.plan(each, GRID).mask()):
        near(found, model(x))
    with attach(model, ct.per_head([WHERE] * 3), grid=GRID), pytest.raises(ChronotopeError, match="3 heads"):
        model(x)


def test_a_route() -> None:
    model, x = Own(), torch.randn(2, N, C)
    q, k, v = model.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    where = ct.route.top_blocks(keep=1, h=1, w=2)
    expected = model.out(ct.attention(q, k, v, grid=GRID, where=where).transpose(1, 2).flatten(2))
    with attach(model, where, grid=GRID):
        near(model(x), expected)


@pytest.mark.parametrize("where", ["window(h=3)", None, 3, {"blocks.0": "window(h=3)"}, {"blocks.0": None}])
def test_what_is_no_pattern_is_refused(where: Any) -> None:
    with pytest.raises(ChronotopeError, match="expected a pattern or a route"):
        checked(where, Stack())


def test_names_that_the_model_has_not_are_refused() -> None:
    with pytest.raises(ChronotopeError, match=r"where names 'block.1', which this model has not; it has blocks.0"):
        attach(Stack(), {"blocks.0": WHERE, "block.1": WHERE})


def test_a_grid_that_the_inputs_tell() -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = Own()

        def forward(self, image: Tensor, *, flip: bool = False) -> Tensor:
            return self.mix(image.flatten(2).transpose(1, 2))

    model = Image()
    with attach(model, WHERE, grid=lambda image, flip=False: ct.Grid(h=image.shape[2], w=image.shape[3])):
        for h, w in ((3, 4), (4, 3), (1, 5)):
            image = torch.randn(1, C, h, w)
            found = model(image, flip=True)
            with masked(shown_by(WHERE, ct.Grid(h=h, w=w))):
                near(found, copy.deepcopy(model)(image))
    with attach(model, WHERE, grid=lambda image: None), pytest.raises(ChronotopeError, match=r"gave None; expected a"):
        model(image)


def test_a_grid_that_fits_no_call_is_an_error_with_the_reason() -> None:
    model = Stack()
    told = r"reached no layer(.|\n)*12 tokens do not lie on Grid\(h=3, w=5\)"
    with attach(model, WHERE, grid=ct.Grid(h=3, w=5)) as handle, pytest.raises(ChronotopeError, match=told):
        model(torch.randn(1, N, C))
    assert all("do not lie on" in layer.why for layer in handle.layers)
    with attach(model, WHERE), pytest.raises(ChronotopeError, match="has the axes"):
        model(torch.randn(1, N, C))  # a sequence, where nothing is known


def test_a_part_that_is_called_alone_lies_on_the_grid_that_was_given() -> None:
    model, x = Stack(), torch.randn(1, N, C)
    with masked(shown_by(WHERE)):
        expected = model.blocks[0](x)
    with attach(model, WHERE, grid=GRID):
        near(model.blocks[0](x), expected)


def test_copies_and_files_are_of_the_model_as_it_was() -> None:
    model, x = Stack(), torch.randn(1, N, C)
    plain, keys = model(x), list(model.state_dict())
    handle = attach(model, WHERE, grid=GRID)
    found = model(x)
    assert list(model.state_dict()) == keys
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    for one in copies:
        assert torch.equal(one(x), plain)
        with attach(one, WHERE, grid=GRID):
            near(one(x), found)
    del model, handle
    gc.collect()
    for one in copies:
        assert torch.equal(one(x), plain)


def test_nothing_keeps_a_model() -> None:
    for held in (True, False):
        model = Stack()
        handle: Handle | None = attach(model, WHERE, grid=GRID)
        model(torch.randn(1, N, C))
        assert handle is not None
        tap = weakref.ref(Tap.on(model))
        if not held:
            handle.remove()
        gone = weakref.ref(model)
        del model
        handle = None
        gc.collect()
        assert gone() is None and tap() is None


def test_a_module_of_two_names_is_one_layer() -> None:
    model, x = Stack(2), torch.randn(1, N, C)
    model.blocks[1] = model.blocks[0]
    with masked(shown_by(WHERE)):
        expected = model(x)
    with attach(model, WHERE, grid=GRID) as handle:
        near(model(x), expected)
    assert [layer.name for layer in handle.layers] == ["blocks.0"]


def test_a_model_named_after_attention_is_no_layer_of_itself() -> None:
    class AttentionNet(Stack):
        pass

    with attach(AttentionNet(), WHERE, grid=GRID) as handle:
        assert [layer.name for layer in handle.layers] == ["blocks.0", "blocks.1"]
