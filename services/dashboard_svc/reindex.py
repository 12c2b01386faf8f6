"""`python -m services.dashboard_svc.reindex`."""

from services.chassis.reindex import main
from services.dashboard_svc.dashboard_search import CORPUS

if __name__ == "__main__":
    main(CORPUS)
