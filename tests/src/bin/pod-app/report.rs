//! Events on standard output, and failures as events.

use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};

use nix::errno::Errno;
use serde_json::{Value, json};

/// The fields of the event `finished`, or the failure that replaces it.
pub(crate) type Outcome = Result<Value, Failure>;

/// What failed, and at which stage.
#[derive(Debug)]
pub(crate) struct Failure {
    stage: &'static str,
    error: io::Error,
    more: Value,
}

impl Failure {
    pub(crate) fn new(stage: &'static str, error: impl Into<io::Error>) -> Self {
        Self {
            stage,
            error: error.into(),
            more: json!({}),
        }
    }

    /// Adds fields to the event.
    pub(crate) fn with(mut self, more: Value) -> Self {
        merge(&mut self.more, more);
        self
    }

    pub(crate) fn fields(&self) -> Value {
        let mut fields = json!({
            "stage": self.stage,
            "errno": errno_name(&self.error),
            "message": self.error.to_string(),
        });
        merge(&mut fields, self.more.clone());
        fields
    }
}

/// Adds the stage at which an I/O error occurred.
pub(crate) trait At<T> {
    fn at(self, stage: &'static str) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, stage: &'static str) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(stage, error))
    }
}

/// Prints an event. Ignores errors: a closed standard output is no reason to stop.
pub(crate) fn event(kind: &str, fields: Value) {
    let mut line = json!({"event": kind});
    merge(&mut line, fields);
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{line}");
    let _ = stdout.flush();
}

pub(crate) fn merge(into: &mut Value, more: Value) {
    if let (Some(into), Value::Object(more)) = (into.as_object_mut(), more) {
        into.extend(more);
    }
}

/// The error's name as in errno(3), or the name of its kind if it has no number: `UnexpectedEof`, `InvalidData`.
pub(crate) fn errno_name(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => format!("{:?}", Errno::from_raw(number)),
        None => format!("{:?}", error.kind()),
    }
}

/// Shuts down the sending direction. If the connection was reset meanwhile, shutdown(2) only reports that it is not
/// connected; this function then returns the reset that is still pending.
pub(crate) fn end_sending(stream: &TcpStream) -> io::Result<()> {
    match stream.shutdown(Shutdown::Write) {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => {
            Err(stream.take_error()?.unwrap_or(error))
        }
        result => result,
    }
}
