//! The `log` section, which all configuration files share.

use crate::config::Section;

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Human-readable text.
    Text,
    /// One JSON object per line.
    Json,
}

/// Logging configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// Format. Defaults to text.
    pub format: LogFormat,
    /// A tracing filter such as `info` or `auth_daemon=debug`. Defaults to `info`.
    pub level: String,
}

impl Log {
    /// Takes the `log` section from `root`.
    pub fn read(root: &mut Section, errors: &mut Vec<String>) -> Self {
        let mut log = root.section("log", errors);
        let format = log.parsed("format", errors, |s| match s {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err("is neither text nor json"),
        });
        let level = log.parsed("level", errors, |s| {
            tracing_subscriber::EnvFilter::try_new(s).map(|_| s.to_owned())
        });
        log.refuse_the_rest(errors);
        Self {
            format: format.unwrap_or(LogFormat::Text),
            level: level.unwrap_or_else(|| "info".to_owned()),
        }
    }
}
