"""
Domains drawn in predetermined proportions (GLM-4.1V §5.3), `--mixture=count:2,open:1`: a curriculum
for each domain, with tiers of its own, and one ratio of oversampling for all.
"""
import math
from collections import ChainMap


def shares(text, samples):
    """"count:2,open:1" -> {"count": 2.0, "open": 1.0}; {} for "".

    Raises ValueError if text does not name the domains of samples, or a share is not positive.
    """
    found = {}
    for part in filter(None, text.split(",")):
        domain, _, share = part.rpartition(":")
        domain = domain.strip()
        try:
            found_share = float(share)
        except ValueError:
            found_share = math.nan
        if not domain or not 0 < found_share < math.inf:
            raise ValueError(f"--mixture={text}: {part!r} is not domain:share, such as count:2, "
                             "with a positive share")
        if domain in found:
            raise ValueError(f"--mixture={text}: {domain!r} has two shares; give it one")
        found[domain] = found_share
    have = sorted({sample.domain for sample in samples})
    if found and sorted(found) != have:
        raise ValueError(f"--mixture={text}: name each domain of the data once; they are "
                         f"{', '.join(have)}")
    return found


def mixed(make, samples, shares, seed, grades, tiers):
    """A curriculum over all samples or, if shares are given, over those of each domain.

    make: `Curriculum`; shares: as `shares` returns them; rest: as make takes them.
    """
    domains = {sample.id: sample.domain for sample in samples}
    if not shares:
        return make(list(domains), seed, grades, tiers, domains)
    parts = {}
    for domain in shares:
        ids = [id for id in domains if domains[id] == domain]
        parts[domain] = make(ids, f"{seed} {domain}", grades, tiers)
    return Mixture(parts, shares)


class Mixture:
    """Draws from several curricula, in set proportions, with the interface of one.

    Of n draws each domain gets its share, to within one or two. Where all questions of a domain
    were dropped, the others keep their proportions.
    """

    def __init__(self, parts, shares):
        """parts: {domain: `Curriculum` of its questions}; shares: {domain: positive number}"""
        self.parts, self.shares = parts, shares
        self.drawn = dict.fromkeys(shares, 0)              # questions of each domain, so far
        self.part_of = {id: part for part in parts.values() for id in part.ids}
        self.ids = sorted(self.part_of)
        self.dropped = ChainMap(*[part.dropped for part in parts.values()])
        self.first = parts[min(parts)]                     # it keeps the ratio of oversampling
        self.expanded, self.note_valid = self.first.expanded, self.first.note_valid

    def turns(self, n):
        """The domains of the next n draws, each the one that is furthest behind its share.
        -> [n], {domain: questions drawn by then}"""
        drawn = dict(self.drawn)
        usable = [domain for domain, part in self.parts.items()
                  if len(part.dropped) < len(part.ids)]
        if not usable:
            raise ValueError("no sample is left to draw: every one was dropped")
        turns = []
        for _ in range(n):
            domain = min(usable, key=lambda domain: (drawn[domain] + 0.5) / self.shares[domain])
            drawn[domain] += 1
            turns.append(domain)
        return turns, drawn

    def draw(self, n):
        """The next n ids. Raises ValueError if all were dropped."""
        turns, self.drawn = self.turns(n)
        return self.in_turn(turns, "draw")

    def peek(self, n):
        """What draw(n) would return now; see `Curriculum.peek`."""
        if len(self.dropped) >= len(self.ids):
            return []
        return self.in_turn(self.turns(n)[0], "peek")

    def in_turn(self, turns, how):
        ids = {}
        for domain in set(turns):
            ids[domain] = iter(getattr(self.parts[domain], how)(turns.count(domain)))
        return [next(ids[domain]) for domain in turns]

    def update(self, id, correct, total):
        """Note a group's result. The level of all questions moves in all curricula."""
        part = self.part_of[id]
        part.update(id, correct, total)
        for other in self.parts.values():
            if "" in part.levels:
                other.levels[""] = part.levels[""]

    def drop(self, id, why):
        self.part_of[id].drop(id, why)

    def rate(self, id):
        return self.part_of[id].rate(id)

    def tier(self, id):
        return self.part_of[id].tier(id)

    def state_dict(self):
        parts = {domain: part.state_dict() for domain, part in self.parts.items()}
        return {"drawn": dict(self.drawn), "parts": parts}

    def load_state_dict(self, state):
        self.drawn = dict(state["drawn"])
        for domain, part in self.parts.items():
            part.load_state_dict(state["parts"][domain])
        self.dropped = ChainMap(*[part.dropped for part in self.parts.values()])
