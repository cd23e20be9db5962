"""Clicks in a real browser."""


def largest(elements: list):
    return max(elements, key=lambda e: e.rect["width"])


def click(browser, element) -> None:
    """As a person does: moves to the middle of the element and presses the button there."""
    from selenium.webdriver.common.action_chains import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    ActionChains(browser).move_to_element(element).pause(0.3).click().perform()
