# Of the requests (second file) those that the configuration (first file) does not have: request plus what it has instead.
FILENAME == ARGV[1] {
	if ($0 ~ /^CONFIG_/) {
		eq = index($0, "=")
		got[substr($0, 8, eq - 8)] = substr($0, eq + 1)
	}
	next
}
{
	has = ($1 in got) ? got[$1] : "n"
	if (has != $2)
		printf "%s\t%s\t%s\t%s\n", $1, $2, $3, has
}
