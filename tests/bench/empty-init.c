/*
 * The floor of a boot: a PID 1 without a library that says it is there and does nothing else.
 * Built with: cc -static -nostdlib -ffreestanding -O2
 */
static long system_call(long number, long first, long second, long third)
{
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(first), "S"(second), "d"(third) : "rcx", "r11", "memory");
	return result;
}

void _start(void)
{
	static const char up[] = "INIT UP\n";

	system_call(1 /* write */, 1, (long)up, sizeof(up) - 1);
	for (;;)
		system_call(34 /* pause */, 0, 0, 0);
}
