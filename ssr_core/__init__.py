"""SSR-Merge without a framework: merge several LoRAs into one that keeps each of them, in closed form.

The method is Subspace Signal Routing (Wei et al., ICML 2026, arXiv 2606.10617). Values flow one way, a file per value:

    Lora: LowRankUpdate by Site -> Subspace -> SufficientStatistics -> router -> Merge: LowRankUpdate by Site

| paper       | here                 | shape                            | meaning                                     |
|-------------|----------------------|----------------------------------|---------------------------------------------|
| A_k, A_comb | `down`               | (r_k, in) or (rank, in, *kernel) | PEFT and ComfyUI disagree on what "A" is    |
| B_k, B_comb | `up`                 | (out, r_k)                       | alpha / rank is folded in here              |
| z           | `z`                  | (tokens, R)                      | `down @ x`, the signal in the joint subspace|
| G_k         | `gram[k]`            | (R, R)                           | sum of z z^T over task k's tokens           |
| G, Q        | `correlation, guide` | (R, R), (rank, R)                | the normal equations, formed when solving   |
| R           | `router`             | (rank, R)                        | Q G^-1, regularized                         |

A *task* is one LoRA with its calibration prompt. A *site* is a module and the output rows that a LoRA writes there.
R = rank + context rows, which belong to no task. A `Correction` holds further sums, of a run in which a first merge
stood beside each LoRA alone; with them the solution is no longer `up` times a router, but a new `up` of (out, R).
`distil` goes on from there by gradient steps, with the LoRAs as teachers.
"""

from .distillation.branch import Branch
from .distillation.distil import DistillationSettings, Distilled, distil
from .distillation.footprint import footprint
from .distillation.judge import Evaluation
from .distillation.point import Point, PointRecorder, memory_of
from .distillation.requirement import DistillationRequirement
from .errors import LoraError, ModelMismatchError, SaveError, SolveError, SSRError, StatisticsError
from .files.lora_file import load_lora, read_pairs, save_lora, to_state_dict
from .files.statistics_file import load_statistics, save_statistics
from .lora.expansion import Expansion, hadamard, kronecker, nearest
from .lora.lora import Lora
from .lora.low_rank_update import LowRankUpdate, concatenate
from .lora.site import Site, align_rows, join_rows
from .lora.subspace import Subspace, join_loras
from .measure.accumulator import Accumulator
from .measure.collector import StatisticsCollector
from .measure.recording import Recording
from .measure.refinement import Refinement
from .measure.requirement import Requirement
from .report.advice import advise
from .report.conflict import Conflict, SiteConflict, find_conflict
from .solve.diagnostics import Residual, residuals
from .solve.merge import Merge, merge
from .solve.merge_report import Report, SiteReport
from .solve.rank import truncate
from .solve.router import Ridge, normal_equations, route, solve_router
from .solve.selection import Rule, check_rules, parse_rules, treatment_of
from .solve.settings import MergeSettings
from .solve.split import Split, split
from .statistics.calibration import Calibration
from .statistics.case import Case
from .statistics.correction import Correction
from .statistics.sufficient_statistics import SufficientStatistics
from .statistics.weight_calibration import weight_calibration

__all__ = [
    "Accumulator",
    "Branch",
    "Calibration",
    "Case",
    "Conflict",
    "Correction",
    "DistillationRequirement",
    "DistillationSettings",
    "Distilled",
    "Evaluation",
    "Expansion",
    "Lora",
    "LoraError",
    "LowRankUpdate",
    "Merge",
    "MergeSettings",
    "ModelMismatchError",
    "Point",
    "PointRecorder",
    "Recording",
    "Refinement",
    "Report",
    "Requirement",
    "Residual",
    "Ridge",
    "Rule",
    "SSRError",
    "SaveError",
    "Site",
    "SiteConflict",
    "SiteReport",
    "SolveError",
    "Split",
    "StatisticsCollector",
    "StatisticsError",
    "Subspace",
    "SufficientStatistics",
    "advise",
    "align_rows",
    "check_rules",
    "concatenate",
    "distil",
    "find_conflict",
    "footprint",
    "hadamard",
    "join_loras",
    "join_rows",
    "kronecker",
    "load_lora",
    "load_statistics",
    "memory_of",
    "merge",
    "nearest",
    "normal_equations",
    "parse_rules",
    "read_pairs",
    "residuals",
    "route",
    "save_lora",
    "save_statistics",
    "solve_router",
    "split",
    "to_state_dict",
    "treatment_of",
    "truncate",
    "weight_calibration",
]
