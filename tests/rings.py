"""What of the conformance suite runs where: the fast part has ten minutes, the slow one less than an hour."""

# Strategies whose longer checks run in the slow part.
SECOND_RING = {
    *("agem", "aper", "bic", "coda_prompt", "corda", "deyo", "dualprompt", "ease", "er_ace", "eva", "gdumb", "gem"),
    *("grad_diff", "icarl", "l2m", "l2p", "lame", "lift", "locft_bf", "loramoe", "mas", "mir", "npo", "ranpac", "rmu"),
    *("cal_ql", "cql", "iql", "redq", "rlpd"),
    *("coact", "fpf", "hft", "inflora", "rmt", "s3ft"),
    *("roid", "salun", "scrub", "sd_lora", "self_distillation_fpt", "simplecil", "slca", "ssd", "vr_lwf"),
}
# Checks that ask the same of any network: judged on the suite's own.
ELSEWHERE = {
    *("processes", "fewer_processes", "accumulation", "mixed", "arguments", "leaks", "memory", "seed", "test_data"),
    "unlabelled",
}
