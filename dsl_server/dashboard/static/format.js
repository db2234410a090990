// Numbers as a person reads them. What is not known is a dash.

const UNKNOWN = "–";
const plain = (digits) => new Intl.NumberFormat("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const [WHOLE, TENTHS, HUNDREDTHS, FINE] = [0, 1, 2, 4].map(plain);

const known = (write) => (value) => (value === null || value === undefined ? UNKNOWN : write(value));

export const whole = known((value) => WHOLE.format(value));
export const tenths = known((value) => TENTHS.format(value));
export const points = known((hundred) => `${HUNDREDTHS.format(hundred)}%`);
export const percent = known((share) => HUNDREDTHS.format(100 * share));
export const loss = known((value) => FINE.format(value));
export const megabytes = known((bytes) => (bytes > 0 && bytes < 5000 ? "<0.01" : HUNDREDTHS.format(bytes / 1e6)));

/** Time from a start: 0:07, 12:30, 3:05:00. */
export const clock = known((seconds) => {
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds) % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
});
