"""The last module that the processes of pages share (tests/pages.py): their collections of garbage
pass over all that is imported before"""

import gc

gc.collect()
gc.freeze()
