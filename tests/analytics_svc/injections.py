"""Two hundred texts that are SQL to whoever pastes them into a statement."""

_OPENINGS = (
    "",
    "'",
    '"',
    "`",
    "\\'",
    "''",
    "')",
    "'))",
    "\x00'",
    "\n'",
    "/* ' */ '",
    "{p0:String}'",
    "'}",
    "％27'",
    "x\\",
)
_PAYLOADS = (
    "; DROP TABLE events; --",
    " OR 1=1 --",
    " OR ''='",
    " UNION ALL SELECT * FROM events --",
    " UNION SELECT name, 1 FROM system.tables FORMAT JSON --",
    "; INSERT INTO events SELECT * FROM events --",
    "; ALTER TABLE events DELETE WHERE 1 --",
    " AND sleep(3) = 0 --",
    "; SET readonly = 0; KILL QUERY WHERE 1 --",
    " INTO OUTFILE '/tmp/x' --",
    " || (SELECT toString(workspace_id) FROM events LIMIT 1) || '",
    ", file('/etc/passwd', 'LineAsString') --",
    " SETTINGS max_execution_time = 0 --",
    "{workspace_id:UUID}; SELECT url('http://127.0.0.1/', CSV)",
)
INJECTIONS = tuple(opening + payload for opening in _OPENINGS for payload in _PAYLOADS)
