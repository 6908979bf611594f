# A fragment's requests as "SYMBOL<TAB>VALUE<TAB>FRAGMENT".
/^[ \t]*(#.*)?$/ { next }
/^CONFIG_[A-Za-z0-9_]+=.+$/ {
	eq = index($0, "=")
	printf "%s\t%s\t%s\n", substr($0, 8, eq - 8), substr($0, eq + 1), fragment
	next
}
{
	printf "configure: fragment %s, line %d: not understood: %s\n", fragment, FNR, $0 > "/dev/stderr"
	bad = 1
}
END { exit bad }
