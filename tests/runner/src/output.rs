//! A file that collects what a program prints.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};

/// A file without a name, for a program's output. A pipe would be held open by what the program leaves running.
pub(crate) fn temporary_file() -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(nix::fcntl::OFlag::O_TMPFILE.bits())
        .open(std::env::temp_dir())
        .context("cannot make a temporary file")
}

/// All that was written to the file.
pub(crate) fn read(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind().context("cannot read a temporary file")?;
    file.read_to_end(&mut bytes)
        .context("cannot read a temporary file")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
