//! aya reports trouble with BTF only as a warning of the `log` crate, and then fails elsewhere with
//! an error that names an innocent map. So its warnings are collected while it loads, stand in the
//! error, and reach the program's log.

use std::{cell::RefCell, sync::Once};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Runs `load` and answers what aya warned about meanwhile, on this thread.
pub(crate) fn collect<T>(load: impl FnOnce() -> T) -> (T, Vec<String>) {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // Another logger that is there already shows the warnings itself.
        if log::set_logger(&Bridge).is_ok() {
            log::set_max_level(LevelFilter::Warn);
        }
    });
    COLLECTED.set(Some(Vec::new()));
    let result = load();
    (result, COLLECTED.take().unwrap_or_default())
}

thread_local! {
    static COLLECTED: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

struct Bridge;

impl Log for Bridge {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        match record.level() {
            Level::Error => tracing::error!(library = record.target(), "{}", record.args()),
            Level::Warn => tracing::warn!(library = record.target(), "{}", record.args()),
            _ => return,
        }
        if record.target().starts_with("aya") {
            COLLECTED
                .with_borrow_mut(|collected| collected.iter_mut().for_each(|all| all.push(record.args().to_string())));
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_of_aya_is_collected_and_one_of_others_is_not() {
        let ((), warnings) = collect(|| {
            log::warn!(target: "aya::bpf", "object BTF couldn't be loaded in the kernel");
            log::warn!(target: "other", "not ours");
        });
        assert_eq!(warnings, ["object BTF couldn't be loaded in the kernel"]);
    }
}
