"ASAP: vision-language pre-training on chest CT volumes and radiology reports"

from .processes import end_with_them

__version__ = "0.1.0"
end_with_them()
