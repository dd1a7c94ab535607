"""Every table and figure of the documents, from saved rows.

Command:  uv run python experiments/documents.py
Time:     a minute.
Result:   what `tables.py` and `figures.py` make.
"""

import figures
import tables

if __name__ == "__main__":
    figures.main()
    tables.main()
