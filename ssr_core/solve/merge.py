"""merge(): from a calibration to one LoRA. The only loop over sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ..errors import SolveError
from ..lora.low_rank_update import LowRankUpdate
from ..lora.site import Site
from ..parallel import each
from ..statistics.calibration import Calibration
from .likeness import alike
from .merge_report import Report, SiteReport
from .problem import Problem
from .rank import Directions, spread_ranks
from .settings import MergeSettings
from .solution import Solution

REMEMBERED_BYTES = 2**30  # of solutions that are kept between the two passes over the sites that spread ranks take

OnSite = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Merge:
    """One LoRA made of several, and what is known about it."""

    updates: Mapping[Site, LowRankUpdate]  # float32
    report: Report


def merge(
    calibration: Calibration,
    settings: MergeSettings | None = None,
    on_site: OnSite = lambda done, total: None,
) -> Merge:
    """Solve the router of every site and route.

    Args:
        on_site: called with (done, total) before each site; may raise to stop.

    Raises:
        SSRError: settings that cannot be meant.
        StatisticsError: statistics that do not belong to these LoRAs, or are not finite.
        SolveError: a correlation matrix is singular, or the result is too large.
    """
    settings = settings or MergeSettings()
    settings.check(len(calibration.loras))
    return merge_of(Problem(calibration, settings), on_site)


def merge_of(problem: Problem, on_site: OnSite = lambda done, total: None) -> Merge:
    """merge() of a problem whose settings were checked; raises what merge() does."""
    calibration = problem.calibration
    problem.check()
    sites, looked = problem.sites, problem.looked
    total = len(sites) + len(looked)
    ranks = _spread(problem, looked, lambda done, _: on_site(done, total))
    updates: dict[Site, LowRankUpdate] = {}
    reports: list[SiteReport] = []

    def made(site: Site) -> tuple[LowRankUpdate | None, SiteReport]:
        if problem.treatments[site] == "drop":
            return None, problem.left_out(site)
        solution, directions = ranks.known.pop(site, None) or (problem.solve(site), None)
        return solution.cut(ranks.of.get(site, problem.rank_of(site)), directions)

    for done, (site, (update, report)) in enumerate(zip(sites, each(made, sites), strict=True)):
        on_site(len(looked) + done, total)
        reports.append(report)
        if update is not None:
            updates[site] = _in_float32(update, site)
    whole = Report(
        *(calibration.names, problem.strengths, tuple(reports)),
        cases=calibration.cases,
        measured=calibration.measured,
        refined=problem.is_refined,
    )
    return Merge(updates, replace(whole, alike=alike(calibration.subspaces)))


@dataclass(eq=False)
class _Ranks:
    """What sites get of a size for all, and solutions that were found on the way."""

    of: Mapping[Site, int] = field(default_factory=dict)
    known: dict[Site, tuple[Solution, Directions]] = field(default_factory=dict)


def _spread(problem: Problem, sites: list[Site], on_site: OnSite) -> _Ranks:
    """Look at these sites first, so that those that need more rank may take from those that need less."""

    def looked(site: Site) -> tuple[Solution, Directions]:
        solution = problem.solve(site)
        return solution, solution.directions()

    ranks, remembered = _Ranks(), 0
    spectra: dict[Site, tuple[float, ...]] = {}
    for site, found in zip(sites, each(looked, sites), strict=True):
        on_site(len(spectra), len(sites))
        spectra[site] = found[1].spectrum
        if remembered < REMEMBERED_BYTES:
            ranks.known[site] = found
            remembered += found[0].nbytes
    ranks.of = spread_ranks(spectra, {site: problem.cost(site) for site in sites}, int(problem.settings.rank))
    return ranks


def _in_float32(update: LowRankUpdate, site: Site) -> LowRankUpdate:
    narrow = LowRankUpdate(update.down.float().contiguous(), update.up.float().contiguous())
    if not narrow.is_finite():
        raise SolveError(
            f"{site}: the merged values do not fit into float32. Lower the strengths, or leave out the LoRA whose "
            "values are that large; its file may be damaged."
        )
    return narrow
