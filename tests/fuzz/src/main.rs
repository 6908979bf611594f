//! Feeds hostile input to whatever parses what others sent.
//!
//! `kuasar-fuzz TARGET [COUNT]` runs one target, `kuasar-fuzz all [COUNT]` each. Every run is another one: it
//! prints its seed, and `KUASAR_FUZZ_SEED` makes it the same run again. It stops at the first input that
//! makes a target panic, and shows it. A target is a file in `targets/` with `seeds()` and `run()`, and its
//! name in the list there.

mod mutate;
mod targets;

use std::{
    fmt::Write as _,
    hash::{BuildHasher, RandomState},
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

use mutate::Mutator;
use targets::{TARGETS, Target};

const DEFAULT_COUNT: u64 = 1_000_000;
/// The variable that makes a run the same as another.
const SEED: &str = "KUASAR_FUZZ_SEED";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let name = words.first().map_or("", String::as_str);
    let chosen: Vec<&Target> = TARGETS.iter().filter(|target| name == "all" || name == target.name).collect();
    let count = words.get(1).map_or(Ok(DEFAULT_COUNT), |count| count.parse());
    let (Ok(count), false) = (count, chosen.is_empty() || words.len() > 2) else {
        let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("usage: kuasar-fuzz all|{} [COUNT]", names.join("|"));
        return ExitCode::from(2);
    };
    let seed = match seed() {
        Ok(seed) => seed,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    println!("{SEED}={seed}");
    for target in chosen {
        let at = Instant::now();
        if let Err(input) = fuzz(target, count, seed) {
            println!("{}: this input makes it panic: {}", target.name, hex(&input));
            return ExitCode::FAILURE;
        }
        #[allow(clippy::cast_precision_loss)]
        let rate = count as f64 / at.elapsed().as_secs_f64();
        println!("{}: {count} inputs, {rate:.0} per second, none made it panic", target.name);
    }
    ExitCode::SUCCESS
}

/// The seed of this run: another each time, unless one is given.
///
/// # Errors
/// When the one that is given is no number.
fn seed() -> Result<u64, String> {
    match std::env::var(SEED) {
        Ok(given) => given.parse().map_err(|e| format!("{SEED}={given}: {e}")),
        // Keys that the kernel's generator gave.
        Err(_) => Ok(RandomState::new().hash_one(0)),
    }
}

/// Runs a target on its seeds and then on `count` inputs made from them.
///
/// # Errors
/// The input at which it panicked.
fn fuzz(target: &Target, count: u64, seed: u64) -> Result<(), Vec<u8>> {
    let seeds = (target.seeds)();
    for seed in &seeds {
        run(target, seed)?;
    }
    let mut mutator = Mutator::new(seeds, seed);
    (0..count).try_for_each(|_| run(target, mutator.next()))
}

fn run(target: &Target, input: &[u8]) -> Result<(), Vec<u8>> {
    catch_unwind(AssertUnwindSafe(|| (target.run)(input))).map_err(|_| input.to_vec())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_found_and_its_input_shown() {
        fn refuses_zero(input: &[u8]) {
            assert!(!input.contains(&0), "a zero");
        }
        let target = Target { name: "zero", seeds: || vec![b"abc".to_vec()], run: refuses_zero };
        let found = fuzz(&target, 100_000, 7).unwrap_err();
        assert!(found.contains(&0));
        assert_eq!(fuzz(&target, 100_000, 7).unwrap_err(), found, "it is the same run");
        assert!((8..20).any(|seed| fuzz(&target, 100_000, seed).unwrap_err() != found), "others differ");
        assert_eq!(hex(&[0, 0xab]), "00ab");
    }

    #[test]
    fn runs_differ() {
        if std::env::var_os(SEED).is_none() {
            assert_ne!(seed().unwrap(), seed().unwrap());
        }
    }
}
