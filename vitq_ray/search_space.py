"""What a search space file imports: `from vitq_ray.search_space import percentiles, loguniform`."""

from vitq_ray.search.space import loguniform as loguniform
from vitq_ray.search.space import percentiles as percentiles
