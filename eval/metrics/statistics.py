"""The real side of every distance, worked out once and kept beside its features: moments' factor, kernel sums, radii.

    real = RealSide(dataset, "inception_clean", device)
    frechet.estimate(real.frechet, groups); kernel.kid(x, real.features, owner, real.kernel("polynomial"))

A second checkpoint, and every cell of a grid, then costs its own side alone. What is kept is named by the features'
own fingerprint, so that other images never meet it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from eval.metrics import frechet, kernel, moments, neighbours
from eval.rows import column, feature_parts, group_of
from shards import storage
from shards.columns import pack_columns, unpack_columns
from shards.dataset import Dataset
from shards.fingerprint import digest_file
from shards.settings import ConfigError

MAX_NPZ = 2_000_000_000  # bytes of a file of statistics


class RealSide:
    """Features of real images in one column of a dataset, and what the distances need of them."""

    def __init__(self, dataset: Dataset, name: str, device: str = "cpu") -> None:
        self.dataset, self.name, self.device = dataset, name, device
        self._features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def features(self) -> np.ndarray:
        """float32 [m, d], read when first asked for."""
        if self._features is None:
            self._features = column(self.dataset, self.name)
        return self._features

    @property
    def frechet(self) -> frechet.Reference:
        """The fixed side of a Frechet distance."""

        def make() -> dict[str, np.ndarray]:
            dim = next(int(x.shape[1]) for x in feature_parts(self.dataset, self.name))
            if len(self) <= dim:
                ref = frechet.reference_of(self.features)
            else:
                total = moments.Accumulator(dim)
                for part in feature_parts(self.dataset, self.name):
                    total.add(part)
                ref = frechet.reference(total.result())
            return {"n": np.array([ref.n]), "mean": ref.mean, "factor": ref.factor, "trace": np.array([ref.trace])}

        kept = self._kept("frechet", make)
        return frechet.Reference(int(kept["n"][0]), kept["mean"], kept["factor"], float(kept["trace"][0]))

    def kernel(self, name: str) -> kernel.Within:
        """The kernel's sums over the pairs of real images."""

        def make() -> dict[str, np.ndarray]:
            w = kernel.within(name, self.features, self.device)
            return {"n": np.array([w.n]), "sums": np.array([w.total, w.diagonal])}

        kept = self._kept(name, make)
        return kernel.Within(int(kept["n"][0]), float(kept["sums"][0]), float(kept["sums"][1]))

    @property
    def radii(self) -> np.ndarray:
        """Distance of each real image to its NEIGHBOURS-th nearest, float64 [m]."""
        return self._kept("radii", lambda: {"radii": neighbours.radii(self.features, device=self.device)})["radii"]

    def _kept(self, what: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        url = storage.join(self.dataset.root, f"statistics-{self.name}-{what}-{self.dataset.fingerprint[:12]}.bin")
        if storage.exists(url):
            try:
                arrays, facts = unpack_columns(storage.read_bytes(url))
                if facts.get("fingerprint") == self.dataset.fingerprint:
                    return arrays
            except ValueError:
                pass  # torn; made again
        arrays = make()
        storage.write_atomic(url, pack_columns(arrays, {"fingerprint": self.dataset.fingerprint}))
        return arrays


def floor(x: np.ndarray, keys: Sequence[str], generated: int) -> float | None:
    """What fd_clip_unit would be, as it is shown, of a model without any fault: from the distance of two random halves
    of the real images x [m, d], whose bias is of order 1/n, brought to the sizes that are compared. None where the
    halves are too small for that (fewer than 2 d).

    Two samples of one distribution of a and b images are about c (1/a + 1/b) apart; halves are c * 4/m.
    """
    half = group_of([f"half {k}" for k in keys], 2)
    small = int(min((half == 0).sum(), (half == 1).sum()))
    if small < 2 * x.shape[1] or generated < 2 * x.shape[1]:
        return None
    a, b = (moments.of(x[half == side]) for side in (0, 1))
    apart = frechet.distance(frechet.reference(a), b)
    return apart * (1 / generated + 1 / len(x)) / (1 / a.n + 1 / b.n)


def npz_digest(path: str, option: str) -> str:
    """sha256 of a file of statistics; ConfigError, naming the option, where there is none."""
    local = storage.local_path(path)
    if not local.is_file():
        raise ConfigError(f"{option}: there is no file {path}; name an .npz with mu and sigma")
    if local.stat().st_size > MAX_NPZ:
        raise ConfigError(f"{option}: {path} is larger than {MAX_NPZ // 10**9} GB, which no such statistics are")
    return digest_file(local)


def from_npz(path: str, option: str, width: int) -> frechet.Reference:
    """The fixed side from a file with `mu` [d] and `sigma` [d, d], as pytorch-fid, clean-fid and ADM give them.
    ConfigError, naming the option, where it is none, or is not of features of this width. The file does not say of how
    many images it is."""
    npz_digest(path, option)
    try:
        with np.load(storage.local_path(path), allow_pickle=False) as file:
            mean, sigma = np.asarray(file["mu"], np.float64), np.asarray(file["sigma"], np.float64)
    except (OSError, ValueError, KeyError, EOFError) as e:
        raise ConfigError(
            f"{option}: {path} cannot be read as statistics ({' '.join(str(e).split())[:120]}); it needs the arrays "
            "mu and sigma"
        ) from None
    finite = np.isfinite(mean).all() and np.isfinite(sigma).all()
    if mean.ndim != 1 or sigma.shape != (len(mean), len(mean)) or not finite:
        raise ConfigError(f"{option}: mu {mean.shape} and sigma {sigma.shape} of {path} are no finite statistics")
    if len(mean) != width:
        raise ConfigError(f"{option}: {path} is of {len(mean)} features, and these have {width}; name the right file")
    return frechet.reference_of_covariance(mean, sigma)
