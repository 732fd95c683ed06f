//! A program in a real terminal: tmux holds the screen and presses the keys.

use std::path::{Path, PathBuf};

use mesh_tests::{Place, TIMEOUT, auth_daemon, eventually};

/// A terminal. Dropping it ends the programs in it.
pub(crate) struct Terminal<'a> {
    place: &'a Place,
    socket: PathBuf,
}

impl<'a> Terminal<'a> {
    /// Starts `auth-daemon` with these arguments in a terminal, whose screen says afterwards how it ended. The terminal's socket is
    /// in `folder`. `None` if tmux is not installed.
    pub(crate) fn start(place: &'a Place, folder: &Path, arguments: &str) -> Option<Self> {
        let socket = folder.join("tmux");
        let terminal = Self { place, socket };
        let program = auth_daemon().unwrap();
        let shell = format!(
            "{} {arguments}; echo it ended with $?; exec cat",
            program.display()
        );
        let start = ["new-session", "-d", "-x", "150", "-y", "20", &shell];
        terminal
            .place
            .command("tmux")
            .unwrap()
            .arg("-V")
            .output()
            .ok()?;
        terminal.tmux(&start);
        Some(terminal)
    }

    /// Runs tmux, and returns what it prints.
    fn tmux(&self, arguments: &[&str]) -> String {
        let mut command = self.place.command("tmux").unwrap();
        command
            .args(["-u", "-f", "/dev/null", "-S"])
            .arg(&self.socket);
        let output = command.args(arguments).output().unwrap();
        assert!(output.status.success(), "tmux {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Presses keys, by tmux's names.
    pub(crate) fn press(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    /// Waits until the screen, with runs of spaces as one, is as `is_so` wants it, and returns it.
    pub(crate) fn shows(&self, what: &str, is_so: impl Fn(&str) -> bool) -> String {
        let mut last = String::new();
        let found = eventually(TIMEOUT, what, || {
            let screen = self.tmux(&["capture-pane", "-p"]);
            let lines = screen.lines().map(|line| {
                let words: Vec<_> = line.split_whitespace().collect();
                words.join(" ") + "\n"
            });
            last = lines.collect();
            is_so(&last).then(|| last.clone())
        });
        found.unwrap_or_else(|error| panic!("{error:#}, on\n{last}"))
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        if let Ok(mut tmux) = self.place.command("tmux") {
            let _ = tmux.arg("-S").arg(&self.socket).arg("kill-server").output();
        }
    }
}
