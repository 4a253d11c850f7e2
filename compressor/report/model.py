"""The report's data model: what `report.json` holds, checked before anything is written."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compressor.optimise.record import SearchRecord

SCHEMA_VERSION: Literal[1] = 1


class Strict(BaseModel):
    """Unknown keys are an error; NaN and infinities are not JSON and not figures."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Interval(Strict):
    """A figure with its 95% confidence interval; bounds are null where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


class Percentiles(Strict):
    """Percentiles over requests."""

    p50: float | None
    p90: float | None
    p99: float | None


class RecipeFacts(Strict):
    """Which recipe was run."""

    name: str
    sha256: str | None = None


class ModelFacts(Strict):
    """The full-precision model."""

    source: str
    revision: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    license: str | None = None


class Calibration(Strict):
    """The calibration data; tokens = samples x length."""

    source: str
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    tokens: int | None = None
    sha256: str | None = None
    split: str | None = None


class Skipped(Strict):
    """A linear layer left in full precision, and why."""

    name: str
    reason: str
    parameters: int | None = None


class Coverage(Strict):
    """How much of the model was quantized; `share` = quantized / total parameters.

    `block_parameters` counts the matrices of the decoder blocks, which are what could be quantized;
    `head_parameters` those of the output layer where it was quantized too.
    """

    total_parameters: int
    quantized_parameters: int
    head_parameters: int = 0
    block_parameters: int | None = None
    share: float
    skipped: list[Skipped] = []


class LayerError(Strict):
    """Relative output error of one layer; `rtn_error` is plain rounding's on the same grid.

    `tokens` counts the calibration tokens that the layer saw, null without calibration;
    `undersampled` layers (rarely chosen experts) saw too few and were rounded to nearest.
    """

    name: str
    scheme: str | None = None
    error: float | None
    rtn_error: float | None = None
    fallback: bool = False
    tokens: int | None = None
    undersampled: bool = False


class Precision(Strict):
    """Mixed precision: mean bits of the codes, the same with scales and zero points, and the
    predicted rise of the mean loss in nats per token."""

    mean_bits: float
    stored_bits: float
    predicted_loss: float


class Refinement(Strict):
    """A refinement of the whole model: KL divergence from the original on calibration samples that
    were held out [nats per token]. `kept` is false where it did not fall: nothing was changed then.

    Errors of layers are those before it.
    """

    kl_before: float
    kl_after: float
    kept: bool
    held_out_samples: int


class Quantization(Strict):
    """How the quantization went."""

    seconds: float | None = None
    peak_rss_bytes: int | None = None
    layers: list[LayerError] = []
    refined: Refinement | None = None


class Quality(Strict):
    """Quality on one held-out text.

    `perplexity_change` is the ratio to the baseline's perplexity minus 1, `perplexity_ci` its 95%
    confidence interval; KL divergence (nats per token) and top-1 agreement are against the
    baseline. `change_p`: bootstrap p-value of no change; `visible_change`: the smallest growth that
    would have been found in 80% of cases.
    """

    text: str
    tokens: int | None = None
    windows: int | None = None
    perplexity: float
    perplexity_change: float | None = None
    perplexity_ci: tuple[float, float] | None = None
    change_p: float | None = None
    visible_change: float | None = None
    bits_per_byte: float | None = None
    kl_mean: float | None = None
    kl_ci: tuple[float, float] | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    top1_ci: tuple[float, float] | None = None


class PositionBin(Strict):
    """Predicted tokens with `first` to `last` tokens of the window before them."""

    first: int
    last: int
    perplexity: float
    perplexity_change: float
    perplexity_ci: tuple[float, float]
    kl_mean: float


class PositionQuality(Strict):
    """Perplexity by position on one text, in windows of so many tokens."""

    text: str
    length: int
    bins: list[PositionBin]


class EqualAfter(Strict):
    """Share of the prompts whose continuations' first so many tokens are the same."""

    tokens: int
    share: float


class DriftExample(Strict):
    """A prompt, and its continuations in words; `first_difference` in tokens, from 0."""

    prompt: str
    baseline: str
    variant: str
    first_difference: int | None


class GenerationDrift(Strict):
    """Greedy continuations of the same prompts: `equal` of them are the baseline's own.

    The median counts those with the whole length.
    """

    prompts: int
    output_length: int
    equal: int
    first_difference: list[int | None]
    median_first_difference: float
    equal_after: list[EqualAfter]
    examples: list[DriftExample] = []


class Flips(Strict):
    """Documents whose answer turned wrong (`broken`) or right (`mended`), or `changed` at all.

    `share` is that of the broken and mended ones.
    """

    broken: int
    mended: int
    changed: int
    share: Interval


class Retained(Strict):
    """Quality that a variant kept on one axis, or on one task of it (then not `overall`).

    `documents`: compared in pairs; for divergence windows. `retained` = value / baseline, for
    divergence the perplexities' inverse ratio. `loss`: how much worse, in the unit of the axis
    (accuracy and calibration absolute, divergence relative), positive for worse. `p`: of the named
    test, alone; `p_holm`: adjusted over the variant's axes. `visible_loss`: the smallest loss that
    the test would have found in 80% of cases at alpha = 5%, null where it could find none.

    `finding`: ``loss`` p < 5% and worse; ``gain`` p_holm < 5% and better; ``equal`` every answer
    and likelihood is the same; ``no-loss`` the test would have found a loss of the `tolerance`;
    ``not-shown`` it was too weak for that.
    """

    axis: str
    task: str | None
    overall: bool
    metric: str
    documents: int
    baseline: float
    value: float
    retained: Interval | None
    loss: Interval
    flips: Flips | None
    test: str
    p: float | None
    p_holm: float | None
    visible_loss: float | None
    tolerance: float
    finding: Literal["equal", "loss", "gain", "no-loss", "not-shown"]


class GateLimit(Strict):
    """One limit, where it was tightest: `decided` is what was compared with it, the figure or the
    end of its interval; both are null where nothing was measured."""

    metric: str
    limit: float
    kind: Literal["most", "least"]
    where: str | None
    value: float | None
    decided: float | None
    passed: bool


class GateOutcome(Strict):
    """Whether a variant kept all limits of the recipe's gate."""

    passed: bool
    decide_on: Literal["bound", "point"]
    limits: list[GateLimit]


class Steady(Strict):
    """Rounds of a point in which the load came to a steady state, and why not in the others."""

    rounds: int
    of: int
    reasons: list[str] = []


class Energy(Strict):
    """Energy over all rounds of a point; tokens are output tokens, PUE is in the figures per token.

    `method`: nvml or rapl (measured), or declared watts.
    """

    method: str
    joules: float
    mean_watts: float
    joules_per_output_token: float
    gco2e_per_output_token: float | None = None
    utilisation_percent: float | None = None
    utilisation_of: str | None = None


class BreakEven(Strict):
    """Tokens after which compressing a variant has paid for itself; null where it never does."""

    run_cost_usd: float
    saving_usd_per_mtok: float
    tokens: float | None
    days: float | None
    reason: str
    currency: str
    formula: str


class RequestSamples(Strict):
    """What the what-if panel computes from, by request: its round, latencies and output tokens.

    A request that failed has no latency and no tokens. `round_seconds`: the window of each round.
    """

    round: list[int]
    ttft_ms: list[float | None]
    tpot_ms: list[float | None]
    output_tokens: list[int]
    round_seconds: list[float]


class Performance(Strict):
    """Speed and cost of one variant at one point of the load; the unit is in each name.

    `rate_per_s` is the arrival rate of an open loop, whose `concurrency` is 0. Latencies are of the
    requests answered, `error_rate` is the share of the others.

    `cost_ratio` is the baseline's cost / the variant's: above 1 the variant is cheaper. Costs rest
    on goodput: tokens of requests inside the service level objective, prefill time included.
    """

    concurrency: int
    engine: str
    kernel: str
    dtype: str
    requests: int
    throughput_tok_s: Interval
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    cost_usd_per_mtok_output: Interval | None
    cost_ratio: Interval | None
    components_usd_per_hour: dict[str, float]
    rounds: int | None = None
    window_seconds: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    goodput_tok_s: Interval | None = None
    goal_met_share: float | None = None
    prefill_tok_s: float | None = None
    decode_tok_s: float | None = None
    speedup: Interval | None = None
    cost_usd_per_mtok_prefill: float | None = None
    cost_usd_per_mtok_decode: float | None = None
    rate_per_s: float | None = None
    itl_ms: Percentiles | None = None
    end_to_end_ms: Percentiles | None = None
    error_rate: float | None = None
    steady: Steady | None = None
    energy: Energy | None = None
    samples: RequestSamples | None = None


class SplitGroup(Strict):
    """Tokens and the device's seconds of the load, or of one of its parts."""

    input_tokens: int
    output_tokens: int
    seconds: float
    requests: int


class Split(Strict):
    """What input and output tokens cost apart at one concurrency.

    Solved from the load's requests, its prompts alone (prefill) and short prompts with whole
    answers (decode). `residual_share`: what the two rates leave unexplained of the measured
    seconds; `worst_residual_share` of the worst group. The blended costs are of the load's mean
    request.
    """

    concurrency: int
    input_usd_per_mtok: Interval
    output_usd_per_mtok: Interval
    seconds_per_input_token: float
    seconds_per_output_token: float
    residual_seconds: float
    residual_share: float
    worst_residual_share: float
    points: int
    mix_input_tokens: float
    mix_output_tokens: float
    blended_usd_per_mtok_output: float
    blended_usd_per_mtok_all: float
    currency: str
    formula: str
    groups: dict[str, SplitGroup]


class Serving(Strict):
    """How a variant was served: of transformers `batching`, of servers `flags` and `variables`."""

    batching: str | None = None
    dtype: str | None = None
    flags: list[str] = []
    variables: dict[str, str] = {}


class Claim(Strict):
    """Throughput with a technique / without it, as it is commonly claimed: from `low` to `high`.

    `over`: what it is claimed against; `source`: the work; `reported`: what that itself reports.
    """

    technique: str
    over: str
    low: float
    high: float
    source: str
    reported: str


class TechniqueGain(Strict):
    """One step of the waterfall: a variant, and the technique that it adds to the step before.

    `step_gain` is against the step before, `total_gain` against the first one, both paired by
    round; `position` is where the step's gain lies beside the claim, `certain` whether its whole
    interval lies there, both null without a claim. Throughputs are goodput.
    """

    name: str
    technique: str
    throughput_tok_s: Interval
    step_gain: Interval
    total_gain: Interval
    claim: Claim | None
    position: Literal["below", "inside", "above"] | None
    certain: bool | None
    sentence: str


class Techniques(Strict):
    """The waterfall at one point of the load.

    `left_out` are the variants from the first on that has no figures there.
    """

    concurrency: int
    rate_per_s: float | None = None
    steps: list[TechniqueGain]
    left_out: list[str] = []


class Reading(Strict):
    """A measurement of the device: the shortest of `calls` calls, each of `amount` bytes read or
    operations done. `what`: read, or the number type of a matrix product."""

    what: str
    amount: float
    calls: int
    best_s: float


class EstimateDevice(Strict):
    """The device that estimates are for: bytes/s of its memory, operations/s by number type.

    Measured by `command` as `readings`, or from the data sheet that `source` names.
    """

    id: str
    label: str
    memory_bytes: float
    bandwidth: float
    peak: dict[str, float]
    price: str | None
    source: str
    command: str = ""
    readings: list[Reading] = []


class Efficiency(Strict):
    """Bound / measured: the median over the baseline's points."""

    decode: float
    prefill: float


class EstimateRow(Strict):
    """One measured point: the roofline's bound, the estimate (bound / efficiency), what was
    measured (medians over requests), and estimate / measured - 1. `bound`: what decoding is bound
    by."""

    variant: str
    concurrency: int
    bound: Literal["memory", "compute"]
    bound_ttft_ms: float
    predicted_ttft_ms: float
    measured_ttft_ms: float
    ttft_ms_error: float
    bound_tpot_ms: float
    predicted_tpot_ms: float
    measured_tpot_ms: float
    tpot_ms_error: float
    bound_tok_s: float
    predicted_tok_s: float
    measured_tok_s: float
    tok_s_error: float


class Estimates(Strict):
    """What a roofline predicts for every measured point.

    `median_tpot_error` is the size of the error over the variants but the baseline, which the
    efficiency was taken from.
    """

    estimate: Literal[True]
    device: EstimateDevice
    efficiency: Efficiency
    rows: list[EstimateRow]
    median_tpot_error: float | None


class ArtifactFile(Strict):
    """One file of an exported directory."""

    path: str
    size_bytes: int
    sha256: str


class TensorLedger(Strict):
    """The artifact's tensors against the source's.

    `missing`: of the source, in no form in the artifact; `added`: not of the source and no part of
    a quantized linear; `unread`: carried over although the modelling code never reads them;
    `bytes_by_scheme`: bytes by scheme, or by dtype where they are not quantized.
    """

    missing: list[str] = []
    added: list[str] = []
    unread: list[str] = []
    bytes_by_scheme: dict[str, int] = {}


class Verification(Strict):
    """What a consumer of an artifact made of it.

    `greedy_agreement`: share of the evaluated model's greedy tokens that it chooses too;
    `max_logit_difference`: largest difference of a logit (of an engine: of a chosen token's
    log-probability); `verified` is None where no consumer could try it, and `why` says so.
    """

    consumer: str
    version: str | None
    loads: bool
    greedy_agreement: float | None
    max_logit_difference: float | None
    verified: bool | None
    why: str = ""


class Artifact(Strict):
    """One exported directory. Without `verification`, it was not asked for."""

    format: str
    path: str
    size_bytes: int
    sha256: str | None = None
    files: list[ArtifactFile] = []
    tensors: TensorLedger | None = None
    verification: Verification | None = None


class Acceptances(Strict):
    """What was accepted of one way to propose, over all test prompts.

    `tokens_per_step`: tokens per pass of the target, its own included, with its standard `error`
    over prompts; `accepted_by_position`: share of the drafts of which at least 1, 2, ... tokens
    were accepted; `rate`: share of the candidates; `histogram`: steps by accepted tokens from 0 on;
    `equal` of `sequences` are the target's own greedy output token by token, and `ties` says of the
    others how far its best logit was above its second where they part.
    """

    tokens_per_step: float
    error: float | None
    steps: int
    accepted_by_position: list[float]
    rate: float | None
    histogram: list[int]
    sequences: int
    equal: int
    ties: list[float] = []


class SpeculationTime(Strict):
    """Seconds of one configuration of our own decoder; `proposer` None: without speculation."""

    batch_size: int
    proposer: str | None
    depth: int
    tokens: int
    steps: int
    seconds: float


class ServedDrafts(Strict):
    """What the measured engine itself counted of drafts at one point of the load.

    `tokens_per_draft`: the target's own token included (vLLM: mean acceptance length); `rate`:
    share of the candidates that were accepted.
    """

    concurrency: int
    rate_per_s: float | None = None
    drafts: int
    tokens_per_draft: float
    rate: float
    accepted_by_position: list[float]


class DraftModel(Strict):
    """A draft model that was given (`source`), quantized (`algorithm` and `scheme`), or both."""

    source: str | None = None
    parameters: int | None = None
    algorithm: str | None = None
    scheme: str | None = None


class Speculation(Strict):
    """A variant's speculator.

    `losses`: per predicted token, by optimizer step; `evaluations`: on the samples held out, with
    the step and the accuracies ``top`` of each head; `results`: by way to propose (chain, tree);
    `tree`: its nodes as ranks of guesses; `served`: by point of the measured load.
    """

    method: str
    depth: int
    trained_on_baseline: bool = False
    draft: DraftModel | None = None
    answer_tokens: int | None = None
    seconds: dict[str, float] = {}
    losses: list[float] = []
    evaluations: list[dict[str, Any]] = []
    prompts: str
    results: dict[str, Acceptances]
    tree: list[list[int]] | None = None
    times: list[SpeculationTime] = []
    served: list[ServedDrafts] = []


class Variant(Strict):
    """One variant; a failed one has `error` and whatever was known before it failed."""

    name: str
    status: Literal["ok", "failed"]
    error: str | None = None
    algorithm: str | None = None
    scheme: str | None = None
    group_size: int | None = None
    size_bytes: int | None = None
    coverage: Coverage | None = None
    precision: Precision | None = None
    quantization: Quantization | None = None
    quality: list[Quality] = []
    retained: list[Retained] = []
    positions: list[PositionQuality] = []
    drift: GenerationDrift | None = None
    gate: GateOutcome | None = None
    serving: Serving | None = None
    performance: list[Performance] = []
    split: list[Split] = []
    break_even: BreakEven | None = None
    speculation: Speculation | None = None
    artifacts: list[Artifact] = []


class Stage(Strict):
    """One stage of the run; a cached one was taken from the store."""

    name: str
    kind: str
    variant: str | None = None
    key: str | None = None
    seconds: float | None = None
    cached: bool = False
    peak_rss_bytes: int | None = None


class Verdict(Strict):
    """The finding in words, computed from the figures.

    `outcome`: ``gain`` some variant is certainly cheaper within the quality limit; ``trade-off``
    some variant is cheaper, none within the limit; ``no-gain`` none is certainly cheaper;
    ``unmeasured`` quality or cost is missing; ``failed`` no variant succeeded.
    """

    outcome: Literal["gain", "trade-off", "no-gain", "unmeasured", "failed"]
    sentence: str
    details: list[str]
    best_variant: str | None
    concurrency: int | None
    quality_limit: float


class ReportModel(Strict):
    """The whole report.

    `record` holds the SHA-256 of every file of the run that the figures were made from.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    title: str
    created: str
    compressor_version: str
    command: str
    recipe: RecipeFacts
    environment: dict[str, Any]
    model: ModelFacts
    calibration: Calibration | None
    baseline: str
    variants: list[Variant] = Field(min_length=1)
    verdict: Verdict
    prices: dict[str, Any] | None
    workload: dict[str, Any] | None
    economics: dict[str, Any] = {}
    techniques: list[Techniques] = []
    estimates: Estimates | None = None
    optimise: SearchRecord | None = None
    stages: list[Stage]
    notes: list[str]
    record: dict[str, str] = {}


def report_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `report.json`."""
    schema = ReportModel.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
