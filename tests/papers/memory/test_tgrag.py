"""TG-RAG (system 126): facts of many times side by side, questions in their time, updates that cost their path only."""

import datetime
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope.papers.memory.tgrag import TemporalGraphMemory
from chronotope.papers.memory.tgrag_facts import Ranking
from chronotope.papers.memory.tgrag_time import LEVELS, leaves, parents, period

QUARTERS = [f"{year}-Q{quarter}" for year in (2021, 2022) for quarter in (1, 2, 3, 4)]
PAIRS, SIZE = 250, 64


def embeddings(n=PAIRS, seed=0):
    """One random direction for each (subject, relation), the same at all times."""
    return torch.nn.functional.normalize(torch.randn(n, SIZE, generator=torch.Generator().manual_seed(seed)), dim=1)


def facts_of(quarter, n=PAIRS):
    """The object of each (subject, relation) in this quarter; 50 subjects with 5 relations each."""
    return [(f"s{i // 5}", f"r{i % 5}", f"o{i}@{quarter}", quarter) for i in range(n)]


class Counted:
    """A summariser that notes its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, node, facts, children):
        self.calls.append(node)
        return f"{node} has {len(facts)} facts [{' '.join(children)}]"


def store(quarters=QUARTERS, **options):
    memory = TemporalGraphMemory(summariser=Counted(), **options)
    for quarter in quarters:
        memory.update(facts_of(quarter), embeddings())
    return memory


def questions(count=200, seed=1):
    chance = random.Random(seed)
    return [(chance.randrange(PAIRS), chance.choice(QUARTERS)) for _ in range(count)]


def test_a_question_finds_the_object_of_its_quarter():
    memory, emb = store(), embeddings()
    assert len(memory.edges) == 2000
    noise = torch.Generator().manual_seed(2)
    right = plain = 0
    for pair, quarter in questions():
        q = emb[pair] + 0.05 * torch.randn(SIZE, generator=noise)
        ids, scores = memory.query(q, (quarter, quarter))
        assert len(ids) == len(scores) == 50
        assert (scores.diff() <= 0).all()
        right += memory.edges[ids[0]].object == f"o{pair}@{quarter}"
        nearest = torch.cosine_similarity(memory.total, q[None], dim=1).argmax()
        plain += memory.edges[nearest].object == f"o{pair}@{quarter}"
    # found: 200 and 27 of 200
    assert right >= 198, right
    assert plain <= 40, plain


def test_a_new_quarter_is_summarised_alone_and_old_answers_are_bit_identical():
    memory, emb = store(), embeddings()
    asked = [(emb[pair], (quarter, quarter)) for pair, quarter in questions(40)] + [(emb[3], ("2021", "2022"))]
    before = [memory.query(*question) for question in asked]
    summaries = {name: node.summary for name, node in memory.nodes.items()}
    memory.summariser.calls.clear()
    dirty = memory.update(facts_of("2023-Q1"), emb)
    assert dirty == {"2023-Q1", "2023"}
    assert memory.summariser.calls == ["2023-Q1", "2023"], "each once, children first"
    after = [memory.query(*question) for question in asked]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[0], new[0])
        assert torch.equal(old[1], new[1])
    assert all(memory.nodes[name].summary == summary for name, summary in summaries.items())
    # A day of a month that is new in a quarter that is not: its leaf and the three nodes above.
    memory.summariser.calls.clear()
    dirty = memory.update([("s0", "meets", "s1", "2022-11-05")], emb[:1])
    assert dirty == set(memory.summariser.calls)
    assert memory.summariser.calls == ["2022-11-05", "2022-11", "2022-Q4", "2022"]
    # The same fact again says nothing new.
    memory.summariser.calls.clear()
    assert memory.update([("s0", "meets", "s1", "2022-11-05")], emb[:1]) == set()
    assert memory.summariser.calls == []
    assert memory.edges[-1].weight == 2


DATES = st.one_of(
    st.dates(datetime.date(2019, 12, 1), datetime.date(2022, 2, 1)).map(lambda day: f"{day:%Y-%m-%d}"),
    st.builds("{}-{:02}".format, st.integers(2020, 2021), st.integers(1, 12)),
    st.builds("{}-Q{}".format, st.integers(2020, 2021), st.integers(1, 4)),
    st.builds(str, st.integers(2020, 2021)),
)
FACTS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.sampled_from("def"), DATES), max_size=25)
SOME = st.sets(st.sampled_from(LEVELS), min_size=1).map(
    lambda some: ("year", *sorted(some - {"year"}, key=LEVELS.index))
)


def edge_set(memory):
    return {(e.subject, tuple(e.relations), e.object, e.start, e.end, e.weight) for e in memory.edges}


def test_eight_steps_build_what_one_step_builds():
    steps, emb = store(), embeddings()
    once = TemporalGraphMemory(summariser=Counted())
    once.update([fact for quarter in QUARTERS for fact in facts_of(quarter)], emb.repeat(8, 1))
    assert edge_set(steps) == edge_set(once)
    assert len(edge_set(once)) == 2000
    assert {name: node.summary for name, node in steps.nodes.items()} == {
        name: node.summary for name, node in once.nodes.items()
    }
    for pair, quarter in questions(20):
        for one, other in zip(*(memory.query(emb[pair], (quarter, quarter)) for memory in (steps, once)), strict=True):
            assert torch.equal(one, other)


@settings(max_examples=60, deadline=None)
@given(FACTS, SOME, st.integers(1, 8), st.integers(0, 10**6))
def test_any_cut_builds_the_same_and_touches_what_it_must(facts, levels, steps, seed):
    emb = torch.randn(len(facts), 4, generator=torch.Generator().manual_seed(seed))
    once, parts = (TemporalGraphMemory(levels, summariser=Counted()) for _ in range(2))
    once.update(facts, emb)
    size = -(-len(facts) // steps) or 1
    for start in range(0, len(facts), size):
        known = edge_texts(parts)
        parts.summariser.calls.clear()
        piece = facts[start : start + size]
        dirty = parts.update(piece, emb[start : start + size])
        fresh = [fact for fact in piece if (fact[0], fact[1], fact[2], period(fact[3]).name) not in known]
        expected = set()
        for fact in fresh:
            for leaf in leaves(period(fact[3]), period(fact[3]), levels):
                expected |= {leaf.name, *(above.name for above in parents(leaf, levels))}
        assert dirty == expected == set(parts.summariser.calls)
        assert len(parts.summariser.calls) == len(expected)
    assert edge_set(once) == edge_set(parts)
    assert {n: node.summary for n, node in once.nodes.items()} == {n: node.summary for n, node in parts.nodes.items()}
    assert torch.equal(once.total, parts.total) or not facts
    for name, node in once.nodes.items():
        for child in node.children:
            below = once.nodes[child]
            assert node.first <= below.first <= below.last <= node.last, (name, child)


def edge_texts(memory):
    """(subject, relation, object, time) of everything known."""
    return {(e.subject, relation, e.object, e.start) for e in memory.edges for relation in e.relations}


def test_nothing_is_overwritten():
    memory = TemporalGraphMemory()
    emb = torch.eye(4)
    ids = memory.add(
        [
            ("a", "leads", "b", "2021"),
            ("a", "leads", "b", "2022"),
            ("a", "left", "b", "2022"),
            ("a", "leads", "b", "2021"),
        ],
        emb,
    )
    assert ids == [0, 1, 1, 0]
    assert [str(edge) for edge in memory.edges] == ["a leads b (2021)", "a leads, left b (2022)"]
    assert [edge.weight for edge in memory.edges] == [2, 2]
    assert torch.equal(memory.total, torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]]))
    with pytest.raises(ct.ChronotopeError, match="ends before it starts"):
        memory.add([("x", "is", "y", "2021"), ("x", "is", "y", "2022", "2021")], emb[:2])
    assert len(memory.edges) == 2, "a refused call leaves nothing behind"


# scores and scopes


def test_the_score_is_the_weighted_sum():
    memory = TemporalGraphMemory(summariser=Counted())
    facts = [
        ("a", "r", "b", "2021"),
        ("a", "r", "c", "2021-Q2"),
        ("d", "r", "e", "2021-Q2"),
        ("d", "r", "e", "2021-Q2"),
        ("f", "r", "g", "2021-05-09"),
        ("a", "r", "h", "2022"),
    ]
    emb = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    memory.update(facts, emb)
    q = emb[1] + 0.5 * emb[4]
    ids, scores = memory.query(q, ("2021-Q2", "2021-Q2"))
    assert set(ids.tolist()) == {0, 1, 2, 3}, "2022 is out"
    middle = sum(datetime.date(2021, m, d).toordinal() for m, d in ((4, 1), (6, 30))) / 2
    year = sum(datetime.date(2021, m, d).toordinal() for m, d in ((1, 1), (12, 31))) / 2
    alignment = {0: 91 / 365, 1: 1, 2: 1, 3: 1}
    apart = {0: year - middle, 1: 0, 2: 0, 3: datetime.date(2021, 5, 9).toordinal() - middle}
    degree = {0: 3, 1: 3, 2: 2, 3: 2}
    weight = {0: 1, 1: 1, 2: 2, 3: 1}
    means = torch.stack([emb[0], emb[1], emb[2] + emb[3], emb[4]])
    relevance = torch.cosine_similarity(means, q[None], dim=1).clamp(min=0)
    for i, score in zip(ids.tolist(), scores.tolist(), strict=True):
        near = 1 - abs(apart[i]) / 365.25 / 10
        assert score == pytest.approx(
            0.35 * alignment[i]
            + 0.15 * near
            + 0.05 * degree[i] / 100
            + 0.15 * weight[i] / 10
            + 0.35 * relevance[i].item(),
            abs=1e-6,
        )
    only = TemporalGraphMemory(ranking=Ranking(0, 0, 0, 0, 1.0))
    only.update(facts, emb)
    ids, scores = only.query(q)
    assert ids[0] == 1
    assert torch.allclose(
        scores.sort().values, torch.cosine_similarity(only.total, q[None], dim=1).clamp(min=0).sort().values
    )


def test_seeds_bring_their_neighbours_and_k_limits():
    memory = TemporalGraphMemory(ranking=Ranking(0, 0, 0, weight=1, relevance=0))
    facts = [("a", "r", "b", "2021"), ("b", "r", "c", "2021"), ("c", "r", "d", "2021"), ("x", "r", "y", "2021")]
    memory.add(facts, torch.eye(4))
    memory.add([facts[1]] * 3 + [facts[2]] * 5 + [facts[3]] * 5, torch.eye(4)[[1] * 3 + [2] * 5 + [3] * 5])
    q = torch.tensor([1.0, 0.1, 0, 0])
    # The seed is edge 0; its neighbour 1 is mentioned more; 2 and 3 share no entity with the seed.
    assert memory.query(q, k=1)[0].tolist() == [1]
    assert memory.query(q, k=2)[0].tolist() == [2, 1], "the seeds 0 and 1 bring 2"
    assert memory.query(q, k=4)[0].tolist() == [2, 3, 1, 0]
    assert memory.query(q, ("1999", "1999"))[0].tolist() == []


@settings(max_examples=60, deadline=None)
@given(FACTS, DATES, DATES)
def test_a_scope_holds_what_overlaps_it(facts, one, other):
    memory = TemporalGraphMemory()
    memory.add(facts, torch.ones(len(facts), 2))
    first, last = sorted((one, other), key=lambda time: period(time).first)
    ids, _ = memory.query(torch.ones(2), (first, last), k=1000)
    inside = [
        i
        for i, edge in enumerate(memory.edges)
        if any(period(first).first <= day <= period(last).last for day in range(edge.first, edge.last + 1))
    ]
    assert sorted(ids.tolist()) == inside


def test_spans_belong_to_every_bucket_between():
    memory = TemporalGraphMemory(summariser=Counted())
    dirty = memory.update([("a", "ran", "b", "2020-Q4", "2021-Q2")], torch.ones(1, 2))
    assert dirty == {"2020-Q4", "2021-Q1", "2021-Q2", "2020", "2021"}
    assert memory.nodes["2021"].children == ["2021-Q1", "2021-Q2"]
    assert [memory.nodes[n].edges for n in ("2020-Q4", "2021-Q1", "2021-Q2", "2021")] == [[0], [0], [0], []]
    coarse = TemporalGraphMemory(("year", "quarter"))
    assert coarse.update([("a", "ran", "b", datetime.date(2021, 8, 5))], torch.ones(1, 2)) == {"2021-Q3", "2021"}
    assert memory.query(torch.ones(2), ("2021-02", "2021-02"))[0].tolist() == [0]


def test_the_calendar():
    assert [above.name for above in parents(period("2021-08-05"), LEVELS)] == ["2021-08", "2021-Q3", "2021"]
    assert period("2020Q1").name == "2020-Q1"
    assert period("2020-Q1").last - period("2020-Q1").first == 90  # 31 + 29 + 31 days
    for bad in ("2021-13", "2021-Q5", "Q1 2021", "2021-02-30", ""):
        with pytest.raises(ct.ChronotopeError, match=f"{re.escape(repr(bad))} is no date"):
            period(bad)
    with pytest.raises(ct.ChronotopeError, match="fit none of the levels month"):
        TemporalGraphMemory(("month",)).add([("a", "r", "b", "2021")], torch.ones(1, 2))


# texts, contexts, storage


def reader():
    """A memory that reads lines such as 'Ada leads Ohm 2021-Q1'."""
    words = {}

    def embed(texts):
        rows = [[words.setdefault(word, len(words)) for word in text.split()] for text in texts]
        return torch.stack([torch.zeros(32).index_fill(0, torch.tensor(row), 1.0) for row in rows])

    def extract(text):
        return [tuple(found) for found in re.findall(r"(\w+) (leads|joins) (\w+) (\S+)", text)]

    return TemporalGraphMemory(summariser=Counted(), extractor=extract, embedder=embed), embed


def test_texts_are_cut_read_and_packed():
    memory, embed = reader()
    first = "Ada leads Ohm 2021-Q1 filler Bea leads Ohm 2021-Q2"
    assert memory.add_text(first, chunk=5, overlap=1) == [0, 1]
    assert memory.texts == ["Ada leads Ohm 2021-Q1 filler", "filler Bea leads Ohm 2021-Q2"]
    assert memory.edges[1].sources == [1]
    memory.add_text("Cid joins Ohm 2021-05-03")
    assert memory.dirty == {"2021", "2021-Q1", "2021-Q2", "2021-05", "2021-05-03"}
    memory.summarise()
    q = embed(["leads Ohm"])[0]
    found = memory.context(q, ("2021-Q2", "2021-Q2"))
    assert found.relations == ["Bea leads Ohm (2021-Q2)", "Cid joins Ohm (2021-05-03)"]
    assert found.sources == [memory.texts[1], memory.texts[2]]
    assert found.entities == ["Bea", "Ohm", "Cid"]
    assert [report.split()[0] for report in found.reports] == ["2021-Q2", "2021-05", "2021-05-03"]
    assert [report.split()[0] for report in memory.reports()] == ["2021", "2021-Q1", "2021-Q2", "2021-05", "2021-05-03"]
    tight = memory.context(q, ("2021-Q2", "2021-Q2"), budgets=(5, 2, 4, 0))
    assert [len(part) for part in (tight.sources, tight.entities, tight.relations, tight.reports)] == [1, 2, 1, 0]
    assert len(memory.reports(budget=12)) < 5
    long = " ".join(f"w{i}" for i in range(2500))
    start = len(memory.texts)
    assert memory.add_text(long) == []
    cut = [text.split() for text in memory.texts[start:]]
    assert [len(words) for words in cut] == [1200, 1200, 300]
    assert cut[0][-100:] == cut[1][:100]
    assert cut[2][-1] == "w2499"


def test_a_stored_memory_goes_on_as_before(tmp_path):
    memory, embed = reader()
    memory.add_text("Ada leads Ohm 2021-Q1 and Bea leads Ohm 2021-Q2")
    torch.save(memory.to_dict(), tmp_path / "memory.pt")
    again, _ = reader()
    again.embedder = embed
    again.from_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    for one in (memory, again):
        assert one.add([("Ada", "leads", "Ohm", "2021-Q1")]) == [0]
        one.add_text("Cid joins Ohm 2021-05-03")
        assert one.summarise() == {"2021", "2021-Q1", "2021-Q2", "2021-05", "2021-05-03"}
    assert memory.to_dict().keys() == again.to_dict().keys()
    for name, value in memory.to_dict().items():
        other = again.to_dict()[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    q = embed(["leads Ohm"])[0]
    for one, other in zip(memory.query(q), again.query(q), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ct.ChronotopeError, match="is not one of levels"):
        TemporalGraphMemory(("year",)).from_dict(memory.to_dict())


def test_bad_input_is_refused():
    memory = TemporalGraphMemory()
    with pytest.raises(ct.ChronotopeError, match="give emb"):
        memory.add([("a", "r", "b", "2021")])
    with pytest.raises(ct.ChronotopeError, match="needs an extractor"):
        memory.add_text("text")
    with pytest.raises(ct.ChronotopeError, match="1 facts with embeddings"):
        memory.add([("a", "r", "b", "2021")], torch.ones(2, 4))
    memory.add([("a", "r", "b", "2021")], torch.ones(1, 4))
    with pytest.raises(ct.ChronotopeError, match="of size 4 as before"):
        memory.add([("a", "r", "b", "2021")], torch.ones(1, 3))
    with pytest.raises(ct.ChronotopeError, match="expected some of year"):
        TemporalGraphMemory(("week",))
