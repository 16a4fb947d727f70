"""k-means over Ray actors: exact, resumable, and the same result on any number of actors."""

from raysl.kmeans.config import KMeansConfig
from raysl.kmeans.driver import Clustering, assign, fit

__all__ = ["Clustering", "KMeansConfig", "assign", "fit"]
