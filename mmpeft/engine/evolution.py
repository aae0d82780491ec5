"""Evolutionary search of the best subnet within a number of parameters."""
from dataclasses import dataclass
from random import Random
from typing import Callable, Dict, List

from ..errors import PEFTError
from .subnets import Subnet, SubnetSpace

__all__ = ['Evolution', 'evolve']

#: Draws for each subnet wanted, before less is taken.
TRIES = 100
#: The same where parents are few, as in the released code.
CHILD_TRIES = 10


@dataclass(frozen=True)
class Evolution:
    """How to search; the defaults are those of the released commands.

    Attributes:
        population (int): Subnets of a generation.
        generations (int): Generations.
        select (int): The best so far, which are parents of the next.
        mutations (int): Children of one parent in a generation.
        crossovers (int): Children of two; what is left is drawn anew.
        width_prob (float): How likely a width of a parent is drawn anew.
        depth_prob (float): The same of a depth.
        seed (int): Of all draws.
    """

    population: int = 50
    generations: int = 15
    select: int = 10
    mutations: int = 25
    crossovers: int = 25
    width_prob: float = 0.2
    depth_prob: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in dict(
                population=1, generations=1, select=1, mutations=0,
                crossovers=0).items():
            if getattr(self, name) < least:
                raise PEFTError(f'{name}={getattr(self, name)} must be at '
                                f'least {least}.')
        for name in ('width_prob', 'depth_prob'):
            if not 0 <= getattr(self, name) <= 1:
                raise PEFTError(f'{name}={getattr(self, name)} is no '
                                'probability.')
        if self.mutations + self.crossovers > self.population:
            raise PEFTError(f'mutations={self.mutations} and crossovers='
                            f'{self.crossovers} are more than population='
                            f'{self.population}.')


def evolve(space: SubnetSpace,
           score: Callable[[Subnet], float],
           how: Evolution,
           budget: int,
           floor: int = 0) -> List[Subnet]:
    """Subnets, best first; no subnet is scored twice.

    What it does depends on the seed and the scores alone. So a search that
    was interrupted goes on exactly where it was if it begins again and the
    scores it has had are looked up.

    Args:
        space (SubnetSpace): What there is.
        score (callable): How good a subnet is; larger is better.
        how (Evolution): Settings.
        budget (int): The most parameters a subnet may have.
        floor (int): The fewest; there is at least one. Defaults to 0.

    Returns:
        list[Subnet]: All that were scored; of equal scores, that with fewer
        parameters first.

    Raises:
        PEFTError: If no subnet has so many parameters.
    """
    _check_limits(space, budget, floor)
    floor = max(floor, 1)
    rng = Random(how.seed)
    scores: Dict[Subnet, float] = {}

    def fits(subnet: Subnet) -> bool:
        return floor <= space.count(subnet) <= budget

    def ranked() -> List[Subnet]:
        return sorted(scores, key=lambda s: (-scores[s], space.count(s), s))

    def collect(draw: Callable[[], Subnet], wanted: int, tries: int) -> None:
        """Score so many new subnets, if that many are found."""
        goal = len(scores) + wanted
        for _ in range(wanted * tries):
            if len(scores) >= goal:
                break
            subnet = draw()
            if subnet not in scores and fits(subnet):
                scores[subnet] = score(subnet)

    for generation in range(how.generations):
        goal = len(scores) + how.population
        if generation:
            parents = ranked()[:how.select]
            collect(
                lambda: space.mutate(
                    rng.choice(parents), rng, how.width_prob, how.depth_prob),
                how.mutations, CHILD_TRIES)
            collect(
                lambda: space.cross(
                    rng.choice(parents), rng.choice(parents), rng),
                how.crossovers, CHILD_TRIES)
        collect(lambda: space.sample(rng), goal - len(scores), TRIES)
        if not scores and fits(space.smallest()):
            # Its children are small, too.
            collect(space.smallest, 1, 1)
        if not scores:
            raise PEFTError(
                f'None of {how.population * TRIES:,} random subnets has '
                f'{_between(floor, budget)} parameters; the smallest has '
                f'{space.count(space.smallest()):,} and the largest '
                f'{space.count(space.largest()):,}. Widen the limits, or give '
                'SubnetHook other choices.')
    return ranked()


def _check_limits(space: SubnetSpace, budget: int, floor: int) -> None:
    least, most = (space.count(s) for s in (space.smallest(), space.largest()))
    if budget < least or floor > most or floor > budget:
        raise PEFTError(
            f'No subnet has {_between(floor, budget)} parameters: the '
            f'smallest has {least:,} and the largest {most:,}.')


def _between(floor: int, budget: int) -> str:
    return f'{floor:,} to {budget:,}' if floor else f'at most {budget:,}'
