r"""3DIS-FLUX: several objects, each with a text and a region of its own, by a mask in the joint attention of a DiT.

Texts: that of the image, 0, and one for each region i, R_i. A text sees a text, a place p of the image sees ...:

    text 0  -> all                              p in no region      -> all
    text i  -> text i                  (t2t)    p -> text i where p in R_i, and text 0 once i2i is over   (i2t)
    text i  -> R_i                     (t2i)    p -> q where some R_i has both                            (i2i)

Each of the four rules holds in the first steps of a sampling: i2i in 4 of 20, the others in all; where it does not
hold, all of that kind is seen. Where regions overlap a place sees what each of its regions lets it see.

Sizes: texts of L_0 .. L_n tokens, regions [n, h w], a joint attention of N = sum L + h w tokens. With `i2i` a place of
R_i meets L_i + |R_i| keys instead of N; the rule is a table of at most n + 1 + 2^n roles, never N x N.

    >>> regions = layouts.boxes(torch.tensor([[0.0, 0, 0.5, 1], [0.5, 0, 1, 1]]), (4, 4)).flatten(1)
    >>> layout = Layout(texts=(3, 2, 2), regions=regions)
    >>> layout_pattern(layout).mask[:, :7].sum(1).tolist()
    [7, 7, 7, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]

    with ct.adapt.control(model, ThreeDIS(layout)):  # all joint layers; told the texts of `layout`, one after another
        image = sample(model)

As released: texts of 200 tokens each, FLUX.1-Depth-dev, which is told the depths of the scene; 20 steps; all 57 layers.

Left out: the model that makes depths of a layout, and masks by SAM: regions come as they are. The released counter ends
each rule one layer late: the first layer of step 4 still has i2i. Its option to drop the texts of the regions after
some steps is the sampler's: run the later steps with the text of the image, without the control.

Compared with `DetailRendererFLUX` of limuloo/3DIS at 446a264 on random queries, two overlapping regions, in each of the
phases: no difference.

A small denoiser of coloured boxes, taught without a mask, paints both boxes in the colour of their own text in 1.00,
1.00 and 0.90 of 200 images (three trainings) under these rules, in 0.31, 0.34 and 0.30 without them, and in all with
`i2i=20`: what goes wrong does so after step 4.

Not shown: pictures of FLUX, numbers of COCO-MIG.

Paper: Dewei Zhou, Ji Xie, Zongxin Yang, Yi Yang, "3DIS-FLUX: simple and efficient multi-instance generation with DiT
rendering", 2025, arXiv 2501.05131.
"""

from __future__ import annotations

from dataclasses import dataclass

from chronotope.adapt import Asked, At, Control
from chronotope.papers.control.roles import ByRoles, Layout, Role, Sees, by_roles, image_first, seen_by
from chronotope.papers.registry import paper


@dataclass(frozen=True)
class Rules:
    """Which of the rules hold: from (i)mage or (t)ext to image or text."""

    i2i: bool = True
    i2t: bool = True
    t2i: bool = True
    t2t: bool = True


def sees(rules: Rules) -> Sees:
    """The rule of a layout between two roles."""

    def between(q: Role, k: Role) -> bool:
        if q.kind == "text":
            bound = 0 not in q.of and (rules.t2t if k.kind == "text" else rules.t2i)
        else:
            bound = bool(q.of) and (rules.i2t if k.kind == "text" else rules.i2i)
        whole = q.kind == "image" and k.kind == "text" and 0 in k.of and not rules.i2i
        return not bound or whole or not q.of.isdisjoint(k.of)

    return between


def layout_pattern(layout: Layout, rules: Rules = Rules(), image_first: bool = False) -> ByRoles:
    """Who sees whom on Grid(n=N); `.mask` is [N, N]."""
    return by_roles(layout.roles(image_first), sees(rules))


@paper(
    system=140,
    name="3DIS-FLUX",
    family="control",
    claim="several objects by a mask in joint attention: texts of regions and places of regions see their own alone",
    evidence=["tests/papers/control/test_threedis_flux.py", "tests/papers/control/test_roles.py"],
)
class ThreeDIS(Control):
    """The mask, in its phases. i2i, i2t, t2i, t2t: in how many steps, from the first, each rule holds."""

    def __init__(self, layout: Layout, i2i: int = 4, i2t: int = 20, t2i: int = 20, t2t: int = 20):
        self.layout, self.ends = layout, (i2i, i2t, t2i, t2t)
        self._made: dict[tuple[Rules, bool], ByRoles] = {}

    def rules(self, step: int) -> Rules:
        """Those that hold at a step."""
        return Rules(*(step < end for end in self.ends))

    def asks(self, at: At, asked: Asked) -> Asked:
        key = (self.rules(at.step), image_first(self.layout, at, asked))
        if key not in self._made:
            self._made[key] = layout_pattern(self.layout, *key)
        return seen_by(asked, self._made[key])
