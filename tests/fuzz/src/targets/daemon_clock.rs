//! The guest's own time, as it reports it.

use vmm_sandboxer::fuzz;

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let sample = |numbers: [i64; 4]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    vec![
        sample([1000, 904, 905, 1011]),
        sample([i64::MAX, i64::MIN, i64::MAX, i64::MIN]),
        sample([0, i64::MAX, i64::MIN, 1]),
    ]
}

pub(crate) fn run(input: &[u8]) {
    let mut numbers = input.chunks(8).map(|part| {
        let mut bytes = [0; 8];
        bytes.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
        i64::from_le_bytes(bytes)
    });
    let mut next = || numbers.next().unwrap_or_default();
    let (sent, arrived, answered, received) = (next(), next(), next(), next());
    let correction = fuzz::clock_correction(sent, arrived, answered, received);
    // What is no more than a millisecond is left alone.
    assert!(correction == 0 || correction.unsigned_abs() > 1_000_000, "{correction}");
}
