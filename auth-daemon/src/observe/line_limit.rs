//! Limits how often the log reports the same thing, and counts what it leaves out.

use std::time::{Duration, Instant};

/// The time for which a number of lines is allowed.
pub(crate) const INTERVAL: Duration = Duration::from_secs(10);

/// The lines about one thing, such as the refusals of one pod for one reason.
#[derive(Debug, Default)]
pub(crate) struct LineLimit {
    /// When the first line of the current interval was written.
    began: Option<Instant>,
    lines: u32,
    /// Number of events since the last line.
    unreported: u64,
}

impl LineLimit {
    /// Takes note of `events`. If a line is due, of which there are at most `most` in ten seconds, returns the number of
    /// events since the last one.
    pub(crate) fn note(&mut self, events: u64, most: u32, now: Instant) -> Option<u64> {
        self.unreported += events;
        if self.is_over(now) {
            (self.began, self.lines) = (Some(now), 0);
        }
        if self.unreported == 0 || self.lines >= most {
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.unreported))
    }

    /// Once the interval is over, returns the number of events that no line has reported.
    pub(crate) fn left_out(&self, now: Instant) -> Option<u64> {
        self.is_over(now).then_some(self.unreported)
    }

    fn is_over(&self, now: Instant) -> bool {
        self.began
            .is_none_or(|began| now.duration_since(began) >= INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_tells_of_what_came_since_the_last() {
        let (mut limit, start) = (LineLimit::default(), Instant::now());
        assert_eq!(limit.note(0, 1, start), None, "nothing to tell");
        assert_eq!(limit.note(5, 1, start), Some(5));
        assert_eq!(limit.note(9, 1, start), None, "too early");
        assert_eq!(limit.note(1, 1, start + INTERVAL), Some(10));
        assert_eq!(limit.note(0, 1, start + 2 * INTERVAL), None, "nothing new");
    }

    #[test]
    fn some_lines_pass_in_each_interval() {
        let (mut limit, start) = (LineLimit::default(), Instant::now());
        let passed = (0..10).filter(|_| limit.note(1, 3, start).is_some());
        assert_eq!(passed.count(), 3);
        assert_eq!(limit.left_out(start), None);
        assert_eq!(limit.left_out(start + INTERVAL), Some(7));
    }
}
