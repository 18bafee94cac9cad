"""The building blocks of locate-then-edit methods; every closed-form method is made of these."""
