"""Networks, their cut into bottom and top, and the auxiliary heads. Only torch is known here."""
