/*
 * The floor of a boot: a PID 1 without a library that says it is there and does nothing else.
 * Built with: cc -static -nostdlib -ffreestanding -O2
 */
#if defined(__x86_64__)
#define WRITE 1
#define PPOLL 271
static long system_call(long number, long first, long second, long third)
{
	register long fourth __asm__("r10") = 0;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(first), "S"(second), "d"(third), "r"(fourth)
			 : "rcx", "r11", "memory");
	return result;
}
#elif defined(__aarch64__)
#define WRITE 64
#define PPOLL 73
static long system_call(long number, long first, long second, long third)
{
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = first;
	register long x1 __asm__("x1") = second;
	register long x2 __asm__("x2") = third;
	register long x3 __asm__("x3") = 0;

	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
}
#else
#error "no system calls for this architecture"
#endif

void _start(void)
{
	static const char up[] = "INIT UP\n";

	system_call(WRITE, 1, (long)up, sizeof(up) - 1);
	for (;;) /* for no descriptor, and for ever */
		system_call(PPOLL, 0, 0, 0);
}
