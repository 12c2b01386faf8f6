"""`python -m services.user_svc.reindex`."""

from services.chassis.reindex import main
from services.user_svc.member_search import CORPUS

if __name__ == "__main__":
    main(CORPUS)
