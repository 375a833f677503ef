//! Steps of work that grows with what comes in, counted in tests: they must not ask what time it is.

/// One step was done.
#[inline(always)]
pub(crate) fn step() {
    #[cfg(test)]
    STEPS.with(|steps| steps.set(steps.get() + 1));
}

#[cfg(test)]
thread_local! {
    static STEPS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// How many steps something took.
#[cfg(test)]
pub(crate) fn steps_of<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = STEPS.get();
    let done = work();
    (STEPS.get() - before, done)
}

/// Asserts that ten times as many cost about ten times as much, and one change among them about as much as among the few.
/// Each held against each other would be a hundred times as much, and a scan of all at a change ten times.
#[cfg(test)]
pub(crate) fn assert_in_proportion([few, of_few]: [std::time::Duration; 2], [many, of_many]: [std::time::Duration; 2]) {
    println!("a thousand: {few:?}, one change {of_few:?}; ten thousand: {many:?}, {of_many:?}");
    assert!(many < few * 40 && of_many < of_few * 5);
}

/// What something took of a processor. For the ratio of two sizes in one run: what others do on the machine is not in it,
/// but how quick the machine is is.
#[cfg(test)]
pub(crate) fn cost_of<T>(work: impl FnOnce() -> T) -> (std::time::Duration, T) {
    let now = || {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        std::time::Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    };
    let before = now();
    let done = work();
    (now() - before, done)
}
