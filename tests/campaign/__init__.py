"""What the campaign of `tests/test_campaign.py` draws from: networks, changes to them, and calls."""
