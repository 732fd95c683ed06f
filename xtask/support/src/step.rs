//! A long step and its progress: a line that names it, the output of its programs, and the time that it took.
//!
//! All of that goes to stderr, so that stdout contains only the command's own result.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// Runs `work` between a line that names it and a line with the time it took.
///
/// # Errors
/// The errors of `work`.
pub fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {name}");
    let start = Instant::now();
    let result = work();
    let seconds = start.elapsed().as_secs_f64();
    match &result {
        Ok(_) => eprintln!("    {name}: done in {seconds:.1} s"),
        Err(_) => eprintln!("    {name}: FAILED after {seconds:.1} s"),
    }
    result
}

/// Runs a program until it exits and streams its output to stderr.
///
/// # Errors
/// If it cannot be started or does not exit with 0.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let status = command
        .stdin(Stdio::null())
        .stdout(io::stderr())
        .status()
        .with_context(|| format!("cannot run `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` ended with {status}");
    }
    Ok(())
}

/// A program's standard output, or `None` if it is missing or fails; for probes.
pub fn output(command: &mut Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The cargo that runs us, with the user's own settings and none of the variables that `cargo run` added for us.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    forget_package(&mut command);
    command
}

/// A command of another toolchain than the one that runs us: no variable that selects or configures a compiler is
/// passed on.
pub fn other_toolchain(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(workspace());
    forget_package(&mut command);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let chooses = [
            "CARGO",
            "CARGO_INCREMENTAL",
            "RUSTC",
            "RUSTDOC",
            "RUSTFLAGS",
            "RUSTDOCFLAGS",
            "RUSTUP_TOOLCHAIN",
            "CARGO_ENCODED_RUSTFLAGS",
        ];
        let prefixes = [
            "RUSTC_",
            "CARGO_BUILD_",
            "CARGO_TARGET_",
            "CARGO_PROFILE_",
            "CARGO_UNSTABLE_",
            "CLIPPY_",
        ];
        if chooses.contains(&&*text) || prefixes.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command
}

/// `cargo run` describes the package it runs, and puts the toolchain's libraries in the loader's path. A build script
/// that watches such a variable would run again each time that cargo is called once by hand and once from here.
pub fn forget_package(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let described = ["CARGO_PKG_", "CARGO_MANIFEST_"]
            .iter()
            .any(|prefix| text.starts_with(prefix));
        if described
            || [
                "CARGO_BIN_NAME",
                "CARGO_CRATE_NAME",
                "CARGO_PRIMARY_PACKAGE",
                "LD_LIBRARY_PATH",
            ]
            .contains(&&*text)
        {
            command.env_remove(name);
        }
    }
}

/// The root of the repository: the folder with Cargo.lock.
pub fn workspace() -> PathBuf {
    // Set by `cargo run`, and right even after the folder was moved; the other was true when this was compiled.
    let manifest = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    manifest
        .ancestors()
        .find(|folder| folder.join("Cargo.lock").is_file())
        .map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Where cargo puts programs of the profile (and target) that this one was built with: `target/release`.
///
/// # Errors
/// When the running program has no path, which a file system that is gone can cause.
pub fn programs() -> Result<PathBuf> {
    let program = env::current_exe().context("cannot tell where this program lies")?;
    Ok(program
        .parent()
        .map_or_else(|| PathBuf::from("/"), Path::to_path_buf))
}

/// The path of an installed program. Also searches the folders of administrators' and cargo's programs, which a user's
/// PATH may lack.
pub fn which(program: &str) -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> = env::var_os("PATH")
        .iter()
        .flat_map(env::split_paths)
        .collect();
    folders.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.extend(env::var_os("CARGO_HOME").map(|home| Path::new(&home).join("bin")));
    folders.extend(env::var_os("HOME").map(|home| Path::new(&home).join(".cargo/bin")));
    folders
        .into_iter()
        .map(|folder| folder.join(program))
        .find(|path| executable(path))
}

/// Whether `path` is an executable file.
pub fn executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// Whether this process runs with user ID 0.
pub fn root() -> bool {
    // A process's folder under /proc belongs to its effective user.
    fs::metadata("/proc/self").is_ok_and(|found| found.uid() == 0)
}

/// A command as text that can be typed: its added variables, the program, its arguments.
pub fn show(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        // Encoded flags contain unprintable separators.
        let value = value?.to_string_lossy().replace('\u{1f}', " ");
        Some(format!("{}={}", name.to_string_lossy(), quote(&value)))
    });
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words = words.map(|word| quote(&word.to_string_lossy()));
    variables.chain(words).collect::<Vec<_>>().join(" ")
}

fn quote(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_=+./:,@%".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        let mut command = Command::new("cargo");
        command
            .args(["install", "--features", "a b"])
            .env("RUSTFLAGS", "-L\u{1f}/lib")
            .env_remove("CARGO");
        assert_eq!(
            show(&command),
            "RUSTFLAGS='-L /lib' cargo install --features 'a b'"
        );
        assert_eq!(quote("it's"), r"'it'\''s'");
    }

    #[test]
    fn a_failing_program_is_named() {
        let error = run(Command::new("sh").args(["-c", "exit 3"]))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("sh -c 'exit 3'") && error.contains('3'),
            "{error}"
        );
        let error = run(&mut Command::new("/nonexistent/program"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent/program"), "{error}");
    }

    #[test]
    fn a_missing_program_is_no_output() {
        assert_eq!(output(&mut Command::new("/nonexistent/program")), None);
        assert_eq!(
            output(Command::new("echo").arg("x")).as_deref(),
            Some("x\n")
        );
    }

    #[test]
    fn programs_are_found_on_the_path_only_when_executable() {
        assert!(which("sh").is_some());
        assert!(which("surely-not-a-program").is_none());
        assert!(!executable(Path::new("/etc/passwd")));
        assert!(!executable(Path::new("/usr")));
    }
}
