//! Limit on the rate of something: a number at once, then one in each interval.

use std::time::Duration;

use tokio::time::Instant;

/// Holds a number of tokens and gets a new one in each interval, up to that number.
pub(crate) struct Bucket {
    most: u32,
    interval: Duration,
    left: u32,
    /// When the last token that was added was due.
    filled: Instant,
}

impl Bucket {
    /// A full one.
    pub(crate) fn new(most: u32, interval: Duration) -> Self {
        Self { most, interval, left: most, filled: Instant::now() }
    }

    /// Takes a token; if there is none, says when there will be one.
    pub(crate) fn take(&mut self) -> Result<(), Instant> {
        let nanos = self.filled.elapsed().as_nanos().checked_div(self.interval.as_nanos()).unwrap_or(0);
        let new = u32::try_from(nanos).unwrap_or(u32::MAX);
        if self.most.saturating_sub(self.left) <= new {
            (self.left, self.filled) = (self.most, Instant::now());
        } else {
            self.left += new;
            self.filled += self.interval * new;
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(self.filled + self.interval),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn some_come_at_once_and_then_one_in_a_while() {
        let mut bucket = Bucket::new(3, Duration::from_secs(2));
        let taken = |bucket: &mut Bucket| (0..10).filter(|_| bucket.take().is_ok()).count();
        assert_eq!(taken(&mut bucket), 3);
        advance(Duration::from_secs(3)).await;
        assert_eq!(taken(&mut bucket), 1);
        assert_eq!(bucket.take(), Err(Instant::now() + Duration::from_secs(1)));
        advance(Duration::from_secs(1)).await;
        assert_eq!(taken(&mut bucket), 1, "the odd second was not lost");
        advance(Duration::from_secs(3600)).await;
        assert_eq!(taken(&mut bucket), 3, "no more than it holds");
    }
}
