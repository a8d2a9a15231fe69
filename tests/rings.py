"""Strategies whose longer checks run in the slow part, since the fast one has ten minutes."""

SECOND_RING = {
    *("agem", "aper", "bic", "coda_prompt", "corda", "deyo", "dualprompt", "ease", "er_ace", "eva", "gdumb", "gem"),
    *("grad_diff", "icarl", "l2m", "l2p", "lame", "lift", "locft_bf", "loramoe", "mas", "mir", "npo", "ranpac", "rmu"),
    *("coact", "fpf", "hft", "inflora", "rmt"),
    *("roid", "salun", "scrub", "sd_lora", "simplecil", "slca", "ssd", "vr_lwf"),
}
