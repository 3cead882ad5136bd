"""TG-RAG: a memory of dated facts, in which nothing is overwritten and a question looks only where its time is.

A fact (subject, relation, object, time) is an edge with the key (subject, object, time): the same fact at two times is
two edges. Above the edges is a calendar: a date is a leaf, in its month, quarter and year, and every time node has a
summary of the facts at it and of its children's summaries. New facts add edges and leaves; only the leaves that they
touch and those above are summarised again. A question q with the scope T is answered in three steps:

    seeds = the k edges in T of largest cos(q, e);  subgraph = edges in T that share an entity with a seed
    score = 0.35 alignment + 0.15 proximity + 0.05 degree + 0.15 weight + 0.35 relevance

alignment: the share of the edge's days that lie in T; proximity: max(0, 1 - years between their middles / 10); degree:
min(1, edges in T at its two entities / 100); weight: min(1, mentions / 10); relevance: max(0, cos(q, e)). Everything is
counted inside T, so facts of other times change no score. Without a scope, alignment and proximity are 0.

Sizes: n facts, embeddings [n, D]. A question costs O(n) comparisons of dates and O(m D) for the m edges in its scope;
an update O(new leaves x depth) summaries.

    >>> memory = TemporalGraphMemory()
    >>> facts = [("Ada", "leads", "Ohm", "2021-Q1"), ("Bea", "leads", "Ohm", "2021-Q2")]
    >>> sorted(memory.update(facts, torch.ones(2, 8)))
    ['2021', '2021-Q1', '2021-Q2']
    >>> ids, scores = memory.query(torch.ones(8), ("2021-Q2", "2021-Q2"))
    >>> memory.edges[ids[0]].subject
    'Bea'

Left out: what language models do (extraction, summaries, embeddings, dates in words) is given as callables, so its
quality is not ours to show, nor are the ECT-QA scores; entities as seeds; scores of text chunks by personalised
PageRank, which the released code has beside the weighted sum. That code also lets years next to each other overlap, and
a second fact of the same key replace the first one's text; here overlap is by days, and both relations are kept.

Paper: Han et al. 2025, "RAG Meets Temporal Graphs: Time-Sensitive Modeling and Retrieval for Evolving Knowledge",
arXiv 2510.13590.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from chronotope.errors import ChronotopeError
from chronotope.papers.memory.tgrag_facts import Context, Edge, Fact, Ranking, Time, TimeNode, span_of
from chronotope.papers.memory.tgrag_time import LEVELS, Period, leaves, parents, period
from chronotope.papers.registry import paper

Extractor = Callable[[str], Sequence[Fact]]
Summariser = Callable[[str, list[str], list[str]], str]
Embedder = Callable[[list[str]], Tensor]


def joined(node: str, facts: list[str], children: list[str]) -> str:
    """The summary that no language model made: everything, line by line."""
    return "\n".join([f"{node}:", *facts, *children])


@paper(
    system=126,
    name="TG-RAG",
    family="memory",
    claim="a memory of dated facts: questions look inside their time, new facts re-summarise only the path above them",
    evidence=["tests/papers/memory/test_tgrag.py"],
)
class TemporalGraphMemory:
    """Dated facts as edges of a graph, under a calendar of summaries. On the CPU, without gradients.

    Args:
        levels: levels of the calendar, of "year", "quarter", "month" and "day".
        ranking: weights of the score.
        summariser: (name of the time node, its facts, its children's summaries) -> summary.
        extractor: text -> facts, for `add_text`.
        embedder: n texts -> [n, D], for facts given without embeddings.
        tokens: text -> its tokens, to cut texts and to keep budgets.
    """

    def __init__(
        self,
        levels: Sequence[str] = LEVELS,
        ranking: Ranking | None = None,
        *,
        summariser: Summariser = joined,
        extractor: Extractor | None = None,
        embedder: Embedder | None = None,
        tokens: Callable[[str], list[str]] = str.split,
    ):
        if not levels or not set(levels) <= set(LEVELS):
            raise ChronotopeError(f"levels={tuple(levels)!r}: expected some of {', '.join(LEVELS)}.")
        self.levels, self.ranking = tuple(levels), ranking or Ranking()
        self.summariser, self.extractor, self.embedder, self.tokens = summariser, extractor, embedder, tokens
        self.edges: list[Edge] = []
        self.nodes: dict[str, TimeNode] = {}
        self.dirty: set[str] = set()
        self.texts: list[str] = []
        self.total = torch.zeros(0, 0)  # [n, D]: the sum of the embeddings of each edge's mentions
        self._ids: dict[tuple[str, str, str, str], int] = {}

    def add(
        self, facts: Sequence[Fact], emb: Float[Tensor, "n d"] | None = None, source: int | None = None
    ) -> list[int]:
        """Adds facts with their embeddings and returns their edges. The time nodes they change are then `dirty`."""
        facts = list(facts)
        spans = [span_of(fact) for fact in facts]  # all checked before anything changes
        places = [leaves(*span, self.levels) for span in spans]
        if emb is None:
            emb = self._embed([f"{fact[0]} {fact[1]} {fact[2]}" for fact in facts])
        if emb.shape[0] != len(facts) or (self.edges and emb.shape[1] != self.total.shape[1]):
            raise ChronotopeError(
                f"{len(facts)} facts with embeddings {list(emb.shape)}: expected one row each"
                + (f", of size {self.total.shape[1]} as before." if self.edges else ".")
            )
        ids = [self._edge(fact, span, where) for fact, span, where in zip(facts, spans, places, strict=True)]
        for i in ids if source is not None else ():
            self.edges[i].sources.append(source)  # type: ignore[arg-type]
        fresh = emb.new_zeros(len(self.edges) - len(self.total), emb.shape[1]).cpu()
        self.total = torch.cat((self.total.view(-1, emb.shape[1]), fresh))
        self.total = self.total.index_add(0, torch.tensor(ids, dtype=torch.int64), emb.detach().cpu())
        return ids

    def update(self, new_facts: Sequence[Fact], emb: Float[Tensor, "n d"] | None = None) -> set[str]:
        """Adds facts and summarises again what they changed: returns the names of these time nodes."""
        self.add(new_facts, emb)
        return self.summarise()

    def add_text(self, text: str, chunk: int = 1200, overlap: int = 100) -> list[int]:
        """Cuts a text in chunks of tokens, and adds the facts that the extractor finds in each."""
        if self.extractor is None or not 0 <= overlap < chunk:
            raise ChronotopeError(
                f"add_text(chunk={chunk}, overlap={overlap}) needs an extractor, and an overlap below the chunk."
            )
        words, ids = self.tokens(text), []
        for start in range(0, max(len(words) - overlap, 1), chunk - overlap):
            self.texts.append(" ".join(words[start : start + chunk]))
            facts = self.extractor(self.texts[-1])
            ids += self.add(facts, source=len(self.texts) - 1) if facts else []
        return ids

    def summarise(self) -> set[str]:
        """Summarises the dirty time nodes, children before parents, and returns their names."""
        done = self.dirty
        for name in sorted(done, key=lambda n: (-LEVELS.index(self.nodes[n].level), self.nodes[n].first)):
            node = self.nodes[name]
            facts = [str(self.edges[i]) for i in node.edges]
            node.summary = self.summariser(name, facts, [self.nodes[child].summary for child in node.children])
        self.dirty = set()
        return done

    def query(
        self, q_emb: Float[Tensor, "d"], scope: tuple[Time, Time] | None = None, k: int = 50
    ) -> tuple[Int[Tensor, "m"], Float[Tensor, "m"]]:
        """The edges of at most k places, best first, and their scores. `scope`: first and last date."""
        index, days = self._inside(scope)
        if not len(index):
            return index, torch.zeros(0)
        mean = self.total[index]  # the direction of a sum is that of a mean
        relevance = F.cosine_similarity(mean, q_emb.detach().cpu()[None], dim=1).clamp(min=0)
        inside = [self.edges[i] for i in index.tolist()]
        seeds = relevance.argsort(descending=True, stable=True)[:k].tolist()
        touched = {entity for i in seeds for entity in (inside[i].subject, inside[i].object)}
        rows = torch.tensor([i for i, e in enumerate(inside) if e.subject in touched or e.object in touched])
        scores = self.ranking.scores(inside, relevance, days)[rows]
        order = scores.argsort(descending=True, stable=True)[:k]
        return index[rows][order], scores[order]

    def context(
        self,
        q_emb: Float[Tensor, "d"],
        scope: tuple[Time, Time] | None = None,
        k: int = 50,
        budgets: tuple[int, int, int, int] = (4000, 1200, 4800, 2000),
    ) -> Context:
        """Local mode: the answer to a query in words, under budgets of tokens for each field of `Context`."""
        found = [self.edges[i] for i in self.query(q_emb, scope, k)[0].tolist()]
        sources = dict.fromkeys(self.texts[i] for edge in found for i in edge.sources)
        entities = dict.fromkeys(entity for edge in found for entity in (edge.subject, edge.object))
        lines = (list(sources), list(entities), [str(edge) for edge in found], self._summaries(scope))
        return Context(*(self._packed(part, budget) for part, budget in zip(lines, budgets, strict=True)))

    def reports(self, scope: tuple[Time, Time] | None = None, budget: int = 16384) -> list[str]:
        """Global mode: the summaries of the time nodes inside the scope, the coarsest first, under a budget."""
        return self._packed(self._summaries(scope), budget)

    def to_dict(self) -> dict[str, Any]:
        """Everything held, as lists, dictionaries and a tensor: for torch.save."""
        return {
            "levels": list(self.levels), "edges": [asdict(edge) for edge in self.edges],
            "nodes": {name: asdict(node) for name, node in self.nodes.items()},
            "dirty": sorted(self.dirty), "texts": list(self.texts), "total": self.total.clone(),
        }  # fmt: skip

    def from_dict(self, given: Mapping[str, Any]) -> TemporalGraphMemory:
        """This memory with what `to_dict` of another one said; callables and ranking stay."""
        if list(given["levels"]) != list(self.levels):
            raise ChronotopeError(f"a memory of levels {given['levels']} is not one of levels {list(self.levels)}.")
        self.edges = [Edge(**edge) for edge in given["edges"]]
        self.nodes = {name: TimeNode(**node) for name, node in given["nodes"].items()}
        self.dirty, self.texts, self.total = set(given["dirty"]), list(given["texts"]), given["total"].clone()
        self._ids = {(e.subject, e.object, e.start, e.end): i for i, e in enumerate(self.edges)}
        return self

    def _embed(self, texts: list[str]) -> Tensor:
        if self.embedder is None:
            raise ChronotopeError("facts without embeddings: give emb [n, D], or the memory an embedder.")
        return self.embedder(texts)

    def _edge(self, fact: Fact, span: tuple[Period, Period], places: list[Period]) -> int:
        """The edge of a fact, a new one where its key is new; its leaves and those above are dirty if it says more."""
        start, end = span
        key = (fact[0], fact[2], start.name, end.name)
        if key not in self._ids:
            self._ids[key] = len(self.edges)
            self.edges.append(Edge(fact[0], fact[2], start.name, end.name, start.first, end.last))
        i = self._ids[key]
        edge = self.edges[i]
        edge.weight += 1
        if fact[1] not in edge.relations:
            edge.relations.append(fact[1])
            for leaf in places:
                self._touch(leaf, i)
        return i

    def _touch(self, leaf: Period, edge: int) -> None:
        child: str | None = None
        for place in (leaf, *parents(leaf, self.levels)):
            node = self.nodes.setdefault(place.name, TimeNode(place.level, place.first, place.last))
            self.dirty.add(place.name)
            if child is None and edge not in node.edges:
                node.edges.append(edge)
            if child is not None and child not in node.children:
                node.children.append(child)
                node.children.sort(key=lambda name: self.nodes[name].first)
            child = place.name

    def _inside(self, scope: tuple[Time, Time] | None) -> tuple[Int[Tensor, "m"], tuple[int, int] | None]:
        """The edges that overlap the scope, and its first and last day."""
        if scope is None:
            return torch.arange(len(self.edges)), None
        first, last = period(scope[0]).first, period(scope[1]).last
        found = [i for i, edge in enumerate(self.edges) if edge.first <= last and edge.last >= first]
        return torch.tensor(found, dtype=torch.int64), (first, last)

    def _summaries(self, scope: tuple[Time, Time] | None) -> list[str]:
        first, last = (0, date.max.toordinal()) if scope is None else (period(scope[0]).first, period(scope[1]).last)
        inside = [node for node in self.nodes.values() if first <= node.first and node.last <= last]
        return [n.summary for n in sorted(inside, key=lambda n: (LEVELS.index(n.level), n.first)) if n.summary]

    def _packed(self, lines: list[str], budget: int) -> list[str]:
        """The first lines that fit the budget together."""
        out = []
        for line in lines:
            budget -= len(self.tokens(line))
            if budget < 0:
                break
            out.append(line)
        return out
