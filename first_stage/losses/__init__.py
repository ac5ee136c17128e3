"""The objective: its terms, their balance, and what keeps the critic in bounds."""
