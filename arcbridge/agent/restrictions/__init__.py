"""Sessions that are less than their users: what they may not do, and how reviews of their own rights answer.

Imported when the first session asks for it, and not before.
"""
