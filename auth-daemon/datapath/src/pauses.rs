//! Pauses between scans of the node's processes.

use std::time::{Duration, Instant};

/// When a scan may be repeated: soon while something is missing, less often in time, and never so often that scans use most of
/// a processor's time.
#[derive(Debug, Default)]
pub struct Pauses {
    /// When the last scan ended, and how much CPU time it used.
    last: Option<(Instant, Duration)>,
    /// Number of scans since the last news.
    scans: u32,
}

impl Pauses {
    /// Pause when nothing is missing: a pod's sandbox may have been created again.
    pub const SLOW: Duration = Duration::from_secs(10);
    /// First pause while something is missing. A sandbox exists some hundred milliseconds before its app.
    const FIRST: Duration = Duration::from_millis(20);
    /// Maximum pause while something is missing.
    const MOST: Duration = Duration::from_secs(1);
    /// Idle time after a scan, as a multiple of the CPU time that the scan used.
    const REST: u32 = 4;

    /// Begins with short pauses again. Call when something new is missing.
    pub fn restart(&mut self) {
        self.scans = 0;
    }

    /// Call when a scan has ended at `now`, which used so much CPU time.
    pub fn ended(&mut self, now: Instant, effort: Duration) {
        self.last = Some((now, effort));
        self.scans = self.scans.saturating_add(1);
    }

    /// Pause after a scan that did not find everything. Doubles each time.
    pub fn while_missing(&self) -> Duration {
        let doubled = Self::FIRST.saturating_mul(1 << self.scans.saturating_sub(1).min(16));
        doubled.min(Self::MOST)
    }

    /// Time of the next scan, which is due after `pause`. `None` if there was none yet, so that one is due now.
    pub fn due(&self, pause: Duration) -> Option<Instant> {
        let (ended, effort) = self.last?;
        Some(ended + pause.max(effort * Self::REST))
    }
}
