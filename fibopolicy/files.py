from fibopolicy.datasets.storage import *  # noqa
