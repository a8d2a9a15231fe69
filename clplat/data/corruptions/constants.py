"""The common corruptions: their names, and what a severity from 1 to 5 means for each.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, arXiv:1903.12261; the numbers are those of hendrycks/robustness (Apache-2.0): its CIFAR and its ImageNet
generator. A severity means different things in the two, so results of one are not to be set beside the other's.
"""

from __future__ import annotations

from typing import Any, Literal

Family = Literal["cifar", "imagenet"]
SEVERITIES = (1, 2, 3, 4, 5)

# Code → name, in the standard order: noise, blur, weather, digital.
CODES = {
    "GN": "gaussian_noise", "SN": "shot_noise", "IN": "impulse_noise",
    "DB": "defocus_blur", "GB": "glass_blur", "MB": "motion_blur", "ZB": "zoom_blur",
    "SW": "snow", "FR": "frost", "FG": "fog", "BR": "brightness",
    "CT": "contrast", "EL": "elastic_transform", "PX": "pixelate", "JP": "jpeg_compression",
}  # fmt: skip
STANDARD = tuple(CODES.values())
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # meant for tuning, kept apart from the fifteen
NAMES = STANDARD + EXTRA

# The ten orders of the CoTTA authors (qinenergy/cotta, MIT), the same for CIFAR and ImageNet.
ORDERS = tuple(
    tuple(CODES[code] for code in line.split())
    for line in (
        "BR PX GN MB ZB GB IN JP DB EL SN FR SW FG CT",
        "JP SN ZB FR CT FG DB EL GN BR GB IN PX SW MB",
        "CT DB GN SN SW FR GB ZB EL JP PX BR IN MB FG",
        "SN FG GB PX SW EL BR IN DB FR CT GN MB JP ZB",
        "PX GB ZB SW FG IN BR MB FR JP GN SN CT DB EL",
        "MB SW FG SN DB CT ZB BR FR EL GB GN PX JP IN",
        "FR IN JP CT ZB GB PX SW DB MB BR EL SN FG GN",
        "GB ZB IN FG SW JP GN FR SN BR CT MB PX DB EL",
        "DB MB ZB SN GN GB JP FG CT PX FR SW BR EL IN",
        "CT GN DB ZB FR GB JP FG PX EL SN IN SW MB BR",
    )
)

CIFAR: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "shot_noise": (500, 250, 100, 75, 50),  # photons of a white pixel
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of values
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # radius, σ of its smoothing
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),  # σ, largest shift, rounds
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, σ
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),  # end, step of the factors
    # mean, deviation, zoom, threshold, radius and σ of the motion, share of the image kept
    "snow": ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
             (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    # weights of image and frost, scale of the texture
    "frost": ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),  # amount, decay of the roughness
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to the value of HSV
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor on the deviation from the mean colour
    # amount and σ of the displacement, corners of the affine map; all in pixels
    "elastic_transform": ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # scale
    "jpeg_compression": (80, 65, 58, 50, 40),  # quality
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),  # standard deviation, times the value
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),  # σ in pixels
    # mean, deviation and σ of the liquid, threshold, strength (water) or σ (mud), whether it is mud
    "spatter": ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
                (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1)),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),  # factor and summand of the saturation of HSV
}  # fmt: skip

IMAGENET: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "snow": ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
             (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
    "frost": ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "elastic_transform": ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88),
                          (29.28, 2.44, 4.88)),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "spatter": ((0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0),
                (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1)),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
}  # fmt: skip
FAMILIES: dict[str, dict[str, tuple[Any, ...]]] = {"cifar": CIFAR, "imagenet": IMAGENET}
